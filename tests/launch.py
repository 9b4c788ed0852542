"""`accelerate launch` with two processes on gloo, for tests of training in several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def two_processes(script: str, out: Path) -> list[dict[str, Any]]:
    """Run a script of tests/ with `out` as its argument; what each rank left in rank-<i>.pt."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", str(ROOT / "tests" / script), str(out),
    ]  # fmt: skip
    # accelerate's own switch for processes starts torchrun with --multi_gpu only; the variable makes them CPU ones
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"rank-{i}.pt") for i in range(2)]
