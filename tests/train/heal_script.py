"""Heals a tiny model in however many processes `accelerate launch` starts; each writes what it ended with."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState

from factormix.factor.config import FactorConfig, HealConfig
from factormix.factor.factorize import factorize
from factormix.factor.heal import heal
from factormix.run.workdir import WorkDirectory
from tests.factor.test_factorize import QUICK, windows
from tests.families import tiny_model

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    state = PartialState()
    dense = tiny_model("llama")
    sparse = factorize(dense, FactorConfig.parse("S1A1E4", **QUICK), windows(), quiet=True)
    before = {name: p.detach().clone() for name, p in sparse.named_parameters()}
    config = HealConfig(tokens=512, batch_tokens=64, lr=1e-3, balance=0.01)
    done = heal(sparse, dense, windows(64), config, work=WorkDirectory(folder / f"work-{state.process_index}", {}))
    moved = sum(float((p - before[name]).abs().sum()) for name, p in sparse.named_parameters())
    torch.save(
        {"weights": sparse.state_dict(), "tokens": done["tokens"], "world": state.num_processes, "moved": moved},
        folder / f"rank-{state.process_index}.pt",
    )
