"""The loop over several processes, its time limit, and what it leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from factormix import FactorMixError
from factormix.train import LoopConfig, train
from tests.factor.test_factorize import windows
from tests.families import tiny_model
from tests.launch import two_processes


def next_token(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"ce": model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss}


def test_two_processes_on_gloo_heal_one_model(tmp_path: Path) -> None:
    ranks = two_processes("train/heal_script.py", tmp_path)
    assert all(rank["world"] == 2 and rank["tokens"] == 512 and rank["moved"] > 0 for rank in ranks)
    for name, tensor in ranks[0]["weights"].items():
        assert torch.equal(tensor, ranks[1]["weights"][name]), f"{name} differs between the processes"


def test_only_what_is_named_trains_and_flags_come_back(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.lm_head.weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    name = "model.layers.0.mlp.up_proj.weight"
    config = LoopConfig(tokens=256, batch_tokens=64, bf16=False)
    result = train(model, windows(), next_token, {name: 1e-3}, config, tmp_path, quiet=True)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {name} and result.params_trained == before[name].numel()
    assert not model.lm_head.weight.requires_grad and model.model.norm.weight.requires_grad


def test_the_time_limit_stops_in_good_order(tmp_path: Path) -> None:
    model = tiny_model("llama")
    config = LoopConfig(tokens=6400, batch_tokens=64, max_minutes=1e-6, bf16=False)
    result = train(model, windows(), next_token, {"lm_head.weight": 1e-3}, config, tmp_path, quiet=True)
    assert result.metrics["steps"] == 1 and (tmp_path / "checkpoint-1" / "trainer_state.json").is_file()


def test_a_single_step_trains(tmp_path: Path) -> None:
    """Warming up starts at a rate of 0; it must leave a step over."""
    model = tiny_model("llama")
    before = model.lm_head.weight.detach().clone()
    config = LoopConfig(tokens=64, batch_tokens=64, bf16=False)
    train(model, windows(), next_token, {"lm_head.weight": 1e-3}, config, tmp_path, quiet=True)
    assert not torch.equal(model.lm_head.weight, before)


def test_gradients_are_clipped_after_backward(tmp_path: Path) -> None:
    moved = {}
    for clip in (0.0, 1e-9):
        model = tiny_model("llama")
        before = model.lm_head.weight.detach().clone()
        config = LoopConfig(tokens=64, batch_tokens=64, clip=clip, warmup=0.0, bf16=False)
        train(model, windows(), next_token, {"lm_head.weight": 1e-3}, config, tmp_path / str(clip), quiet=True)
        moved[clip] = float((model.lm_head.weight.detach() - before).abs().mean())
    assert moved[1e-9] < 0.5 * moved[0.0]  # Adam is blind to scale, but not to gradients below its epsilon


def test_an_unknown_name_and_too_few_tokens_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(FactorMixError, match="nothing to train"):
        train(model, windows(), next_token, {"no.such": 1e-3}, LoopConfig(tokens=4096), tmp_path, quiet=True)
    with pytest.raises(FactorMixError, match="less than one step"):
        train(model, windows(), next_token, {"lm_head.weight": 1e-3}, LoopConfig(tokens=16), tmp_path, quiet=True)


def test_mixed_precision_ends_with_the_training(tmp_path: Path) -> None:
    """accelerate's autocast stayed around the forward: a healed model then decoded in bfloat16, and slowly."""
    model = tiny_model("llama")
    ids = torch.arange(3, 11).unsqueeze(0)
    config = LoopConfig(tokens=256, batch_tokens=128, bf16=True)
    train(model, windows(), next_token, {"lm_head.weight": 0.0}, config, tmp_path, quiet=True)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny_model("llama")(ids).logits)
    assert "forward" not in model.__dict__
