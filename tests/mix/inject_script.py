"""Run by test_stage1 under `accelerate launch`: inject on this rank, and leave its weights behind."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import PartialState

from factormix.mix.adapter_files import adapter_tensors
from factormix.mix.batches import Stage1Batches
from factormix.mix.config import InjectConfig
from factormix.mix.stage1 import inject
from tests.factor.test_factorize import windows
from tests.mix.adapted import base_model


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    state = PartialState()
    config = InjectConfig(tokens=512, batch_tokens=128, window=16, width=8, lr=1e-2, layers="0,1")
    batches = Stage1Batches(windows(32), [], windows(32, seed=7), 16)
    wrapped, done = inject(base_model("llama"), "pubmed", batches, config, quiet=True)
    seen = {"world": state.num_processes, "tokens": done["tokens"], "weights": adapter_tensors(wrapped, "pubmed")}
    torch.save(seen, folder / f"rank-{state.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
