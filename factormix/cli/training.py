"""What the commands that train have in common: factor, inject, adapt."""

from __future__ import annotations

import time
from typing import Any

from factormix.run.progress import say
from factormix.run.record import RunRecord
from factormix.run.workdir import WorkDirectory

SCHEMA_VERSION = 1


def say_resumed(work: WorkDirectory, stage: str, quiet: bool) -> None:
    """Say which step of a training stage a killed run goes on after."""
    steps = [int(folder.name.split("-")[1]) for folder in work.path.glob(f"{stage}/checkpoint-*")]
    if steps:
        say(f"resuming after step {max(steps)} in {str(work.path)!r}.", quiet)


def result_json(record: RunRecord, started: float, params_trained: int) -> dict[str, Any]:
    """The --json of a training command (docs/json.md); `started` is of time.perf_counter."""
    return {
        "schema_version": SCHEMA_VERSION,
        "seconds": time.perf_counter() - started,
        "tokens": record.tokens,
        "peak_bytes": record.peak_memory_bytes,
        "params_trained": params_trained,
        "metrics": record.metrics,
    }
