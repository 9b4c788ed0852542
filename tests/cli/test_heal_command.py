"""`factormix heal`: a sparse model trained further, from its own directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import factormix
from factormix.cli import app
from factormix.factor.heal import HealingLoss, share_frozen
from factormix.run.directory import sha256
from tests.cli.tiny import save_tiny, write_text

Run = Callable[..., str]
BUDGET = ("--tokens", 2048, "--batch-tokens", 128, "--window", 32, "--lr", 1e-3)


def read(path: str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def distance(run: Run, model: object, dense: Path, text: Path) -> float:
    run("eval", model, "--against", dense, "--text", text, "--tokens", 2048, "--window", 32, "--json", "e.json")
    return float(read("e.json")["agreement"]["words"]["kl"])


def test_heals_a_saved_model_and_again(run: Run, sparse: Path, llama: Path, text: Path, tmp_path: Path) -> None:
    other = write_text(tmp_path / "other.txt")
    said = run("heal", sparse, "--against", llama, "-o", "once", "--text", text, "--json", "h.json", *BUDGET)
    assert "healed on 2,048 tokens" in said and not Path("once.work").exists()
    run("heal", "once", "--against", llama, "-o", "twice", "--text", other, *BUDGET)

    first, second = factormix.load("once"), factormix.load("twice")
    ffns = first.sparse_ffns().values()
    assert read("h.json")["params_trained"] == sum(p.numel() for ffn in ffns for p in ffn.parameters())
    assert first.config.factormix["made_by"]["healing"]["tokens_before"] == 0
    made_by = second.config.factormix["made_by"]
    assert made_by["healing"]["tokens"] == made_by["healing"]["tokens_before"] == 2048
    assert made_by["config"] == factormix.load(sparse).config.factormix["made_by"]["config"]  # how it was factored
    assert read("twice/run.json")["data"] == {"words.txt": sha256(text), "other.txt": sha256(other)}
    assert distance(run, sparse, llama, text) > distance(run, "once", llama, text) > distance(run, "twice", llama, text)
    dense = dict(AutoModelForCausalLM.from_pretrained(llama).named_parameters())
    own = {name: p for name, p in second.named_parameters() if ".mlp." not in name}
    assert own and all(torch.equal(p, dense[name]) for name, p in own.items())


def test_both_models_use_one_set_of_frozen_tensors(sparse: Path, llama: Path) -> None:
    student, teacher = factormix.load(sparse), AutoModelForCausalLM.from_pretrained(llama)
    share_frozen(student, teacher)
    theirs = {name: p.data_ptr() for name, p in teacher.named_parameters()}
    assert {name for name, p in student.named_parameters() if theirs.get(name) == p.data_ptr()} == {
        name for name, _ in student.named_parameters() if ".mlp." not in name
    }


def test_a_killed_healing_goes_on_from_its_checkpoint(run: Run, sparse: Path, llama: Path, text: Path) -> None:
    words = ["heal", sparse, "--against", llama, "--text", text, "--save-steps", 2, *BUDGET, "-o"]
    original, calls = HealingLoss.__call__, []

    def dies(self: HealingLoss, model: torch.nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        calls.append(1)
        if len(calls) > 22:  # four windows a step: in step 6
            raise KeyboardInterrupt
        return original(self, model, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HealingLoss, "__call__", dies)
        CliRunner().invoke(app, [str(word) for word in [*words, "killed"]])
    assert Path("killed.work/healing/checkpoint-4").is_dir() and not Path("killed").exists()
    result = CliRunner().invoke(app, [str(word) for word in [*words, "killed"]])
    assert result.exit_code == 0 and "resuming after step 4" in result.stderr
    run(*words, "whole")
    for a, b in zip(factormix.load("killed").parameters(), factormix.load("whole").parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_recipe_is_the_same_as_flags(run: Run, sparse: Path, llama: Path, text: Path) -> None:
    run("heal", sparse, "--against", llama, "-o", "flags", "--text", text, *BUDGET, "--seed", 3)
    lines = [f"model: {sparse}", f"against: {llama}", f"text: [{text}]", "out: recipe", "window: 32", "seed: 3"]
    Path("r.yaml").write_text("\n".join([*lines, "tokens: 64", "batch_tokens: 128", "lr: 1.0e-3"]), encoding="utf-8")
    run("heal", "--recipe", "r.yaml", "--tokens", 2048)  # a flag wins
    assert sha256("recipe/model.factormix.safetensors") == sha256("flags/model.factormix.safetensors")
    assert read("flags/run.json")["seed"] == read("recipe/run.json")["seed"] == 3
    said = run("validate", "r.yaml", "--json", "v.json")
    assert "# for factormix heal" in said and "on 0 tokens in windows of 32: 0 steps of 128" in said
    assert read("v.json")["command"] == "heal" and read("v.json")["recipe"]["kl"] == 1.0
    Path("again.yaml").write_text(said, encoding="utf-8")
    assert run("validate", "again.yaml") == said


def test_the_plan_counts_whole_steps(run: Run, sparse: Path, llama: Path, text: Path) -> None:
    """As the loop does: steps of whole windows, and what is left over is not trained on."""
    ask = ["heal", sparse, "--against", llama, "--text", text, "--window", 32, "--batch-tokens", 100, "--tokens", 1000]
    said = run(*ask, "-o", "out", "--dry-run")
    assert "on 960 tokens in windows of 32: 10 steps of 96" in said and "memory, estimated: 0.0" in said
    assert not Path("out").exists()
    assert "healed on 960 tokens" in run(*ask, "-o", "out")


def test_refuses(run: Run, refused: Callable[..., str], sparse: Path, llama: Path, text: Path, tmp_path: Path) -> None:
    wide = save_tiny("gpt2", tmp_path / "gpt2")
    ask = ("-o", "out", "--text", text)
    assert "is dense" in refused("heal", llama, "--against", llama, *ask, *BUDGET)
    assert "--tokens 300000" in refused("heal", sparse, "--against", llama, *ask)
    assert "is not the dense model" in refused("heal", sparse, "--against", wide, *ask, *BUDGET)
    assert "is not the dense model" in refused("heal", sparse, "--against", sparse, *ask, *BUDGET)
    assert "or a recipe" in refused("heal", sparse, *ask, *BUDGET)
    assert not Path("out").exists()
