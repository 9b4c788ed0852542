"""Parity sees each kind of damage by the number that is meant to see it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from factormix.export import CONTAINERS, Parity
from factormix.export.needs import read_needs
from factormix.export.parity import compare
from factormix.run.errors import FactorMixError
from tests.export.tiny import exported, factored, windows

ROUTER = "model.layers.0.block_sparse_moe.router.layer.weight"
DOWN = "model.layers.0.block_sparse_moe.output_linear.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    model, folder = factored("llama"), tmp_path_factory.mktemp("parity") / "out"
    exported(model, folder)
    return model, folder


def damaged(folder: Path, into: Path, name: str, change: float | torch.Tensor) -> Path:
    into.mkdir()
    for file in folder.iterdir():
        (into / file.name).write_bytes(file.read_bytes())
    tensors = load_file(into / "model.safetensors")
    tensors[name] = (tensors[name] * change).contiguous()
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    return into


def run(model: PreTrainedModel, folder: Path) -> Parity:
    return compare(model, folder, CONTAINERS["granite"], read_needs(model), windows(16), quiet=True)


def test_a_good_export(made: tuple[PreTrainedModel, Path]) -> None:
    parity = run(*made)
    assert parity.tokens == 1024 and parity.failures(CONTAINERS["granite"]) == []
    assert 0 < parity.logit_error < 1e-3 and parity.flips_beyond_ties == 0
    assert parity.perplexity == pytest.approx(parity.exported_perplexity, rel=1e-4)


def test_weights_that_differ_show_in_forced_logits(made: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    parity = run(made[0], damaged(made[1], tmp_path / "bad", DOWN, 1.05))
    assert parity.logit_error > 1e-3 and "logits" in parity.failures(CONTAINERS["granite"])[0]


def test_a_router_that_differs_shows_in_flips_alone(made: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    rows = torch.tensor([[1.0], [-1.0], [1.0]])  # one expert's scores turned round
    parity = run(made[0], damaged(made[1], tmp_path / "bad", ROUTER, rows))
    assert parity.logit_error < 1e-3 < parity.flips and parity.flips_beyond_ties > 1e-3
    assert any("routing" in failure for failure in parity.failures(CONTAINERS["granite"]))


def test_missing_weights_are_an_error(made: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    folder = damaged(made[1], tmp_path / "bad", DOWN, 1.0)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(DOWN)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FactorMixError, match="does not load whole"):
        run(made[0], folder)


def test_limits() -> None:
    fine = Parity(4096, 1e-4, 1e-4, 5e-4, 0.0, 2e-3, 0.999, 20.0, 20.01)
    granite, glm = CONTAINERS["granite"], CONTAINERS["glm4_moe"]
    assert fine.failures(granite) == []
    assert fine.perplexity_change == pytest.approx(5e-4)
    for name, value in (("logit_error", 2e-3), ("flips", 2e-3), ("top1", 0.99), ("exported_perplexity", 20.1)):
        assert len(replace(fine, **{name: value}).failures(granite)) == 1, name
    assert replace(fine, flips=2e-3).failures(glm) == []
    assert len(replace(fine, logit_error=math.nan).failures(granite)) == 1
