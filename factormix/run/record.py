"""run.json: what was run, with what, on what, how long it took and what came out.

Run it::

    record = RunRecord("factorize", config, seed=0, dtype="float32")
    with record.phase("statistics"):
        ...
    record.tokens = 16384
    record.metrics["perplexity"] = 38.3
    record.write(folder / "run.json")
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from factormix.run.directory import write_json

SCHEMA_VERSION = 1


@dataclass
class RunRecord:
    """One run; its fields are the schema of run.json.

    Attributes:
        command: the command or function that ran.
        config: its whole config as plain values.
        seed: the seed of everything random, None when nothing was.
        dtype: the dtype computed in, like "float32".
        device: "cpu" or "cuda"; decides which memory is measured.
        data: name of each text or table read -> its SHA-256.
        tokens: tokens seen in all.
        metrics: what came out; numbers by name, nesting allowed.
        phases: [{"name", "seconds"}] in order of ending (wall clock).
        versions: of python, torch, transformers and factormix.
        threads: torch's threads within an operation.
        machine: processor and number of cores (no host name).
        started: UTC, ISO 8601.
        peak_memory_bytes: see `peak_memory_bytes`; set by `write`.
        schema_version: rises when a field changes its meaning.
    """

    command: str
    config: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    data: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    phases: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: _versions())
    threads: int = field(default_factory=lambda: _threads())
    machine: str = field(default_factory=lambda: _machine())
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    peak_memory_bytes: int = 0
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if hasattr(self.config, "to_dict"):
            self.config = self.config.to_dict()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the run; a part that raises is recorded too."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phases.append({"name": name, "seconds": time.perf_counter() - start})

    def seconds(self, name: str) -> float:
        """Wall-clock seconds of all phases of that name together."""
        return sum(phase["seconds"] for phase in self.phases if phase["name"] == name)

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values, the schema version first."""
        return {"schema_version": self.schema_version, **asdict(self)}

    def write(self, path: str | Path) -> None:
        """Write run.json atomically, with the peak memory up to now."""
        self.peak_memory_bytes = peak_memory_bytes(self.device)
        write_json(path, self)


def peak_memory_bytes(device: str = "cpu") -> int:
    """The most memory in use at once since the process began (on CUDA: that torch allocated on the device).

    On Linux this is VmHWM: ru_maxrss, used elsewhere, starts at the parent's peak in a spawned process.
    """
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="utf-8") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB on Linux, bytes on macOS


def current_memory_bytes(device: str = "cpu") -> int:
    """Memory in use now: the process's resident set (on CUDA: what torch has allocated on the device)."""
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.memory_allocated(device)
    import psutil  # type: ignore[import-untyped, unused-ignore]

    return psutil.Process().memory_info().rss


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "factormix"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _machine() -> str:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
        name = next((line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"
