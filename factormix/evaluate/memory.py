"""Measure the peak memory of a stretch of work, from the GPU's allocator or the process's resident set."""

from __future__ import annotations

import threading

import torch

from factormix.run.record import current_memory_bytes

SAMPLE_SECONDS = 0.002  # seconds between two readings of the resident set


class PeakMemory:
    """Measures, in ``rise``, the most bytes that a ``with`` block held in addition to those held before it.

    On a CUDA device it reads the allocator's peak, after resetting it. On a CPU a thread reads the resident set every
    two milliseconds, so do not time the work inside the block. Memory that the C library kept from earlier work and
    uses again is not counted.
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
