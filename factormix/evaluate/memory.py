"""Peak memory of one stretch of work: the accelerator's allocator, or the rise of the process's resident set."""

from __future__ import annotations

import threading

import torch

from factormix.run.record import current_memory_bytes

SAMPLE_SECONDS = 0.002  # between looks at the resident set


class PeakMemory:
    """``rise``: bytes that the work inside a ``with`` block held at most beyond what was held before it.

    On a CUDA device, from the allocator's peak, which is set back. On a CPU, from the resident set, looked at by a
    thread every two milliseconds: do not time what runs inside. Memory that the C library kept from earlier work and
    uses again does not show.
    """

    rise: int = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> PeakMemory:
        self._before = current_memory_bytes(str(self.device))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._done = threading.Event()
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.rise = torch.cuda.max_memory_allocated(self.device) - self._before
        else:
            self._done.set()
            self._watcher.join()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.rise = max(self.rise, current_memory_bytes(str(self.device)) - self._before)
