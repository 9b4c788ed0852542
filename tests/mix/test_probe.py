"""The head's start: the least of its convex objective, whatever the seed, and scored before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from factormix.data.labelled import Labelled
from factormix.mix import probe
from factormix.mix.examples import by_example, collate, encode
from factormix.mix.mix_model import MixModel
from factormix.mix.score import example_logits
from factormix.mix.stage2 import adapt, task_of
from factormix.mix.task import Task
from tests.families import tiny_model
from tests.mix.toy import LABELLED, QUICK, domains, examples, mix


def model_and_task(family: str, folder: Path, train: Labelled) -> tuple[MixModel, Task]:
    model = tiny_model(family)
    task = task_of(model, train, QUICK)
    return mix(model, domains(family, folder), outputs=task.outputs, pooling=task.pooling), task


def gradient(model: MixModel, encoded: list[Any], task: Task, ridge: float) -> float:
    """Norm of the objective's gradient at the head as it is."""
    states = probe.pooled_states(model, encoded, task, 0, 8).double()  # (rows, H)
    batch, mean, spread = collate(encoded, task, 0), states.mean(0), states.std(0)
    weight = (model.head.weight.detach().double() * spread).requires_grad_()
    bias = (model.head.bias.detach().double() + model.head.weight.detach().double() @ mean).requires_grad_()
    logits = by_example((states - mean) / spread @ weight.T + bias, batch["sizes"])
    targets = batch["targets"]
    loss = task.loss(logits, targets.double() if targets.is_floating_point() else targets)
    (loss + ridge * weight.square().sum() / len(encoded)).backward()
    return float(torch.cat([weight.grad.flatten(), bias.grad]).norm())


@pytest.mark.parametrize("kind", LABELLED)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_head_is_at_the_least_of_its_objective(
    family: str, kind: str, tmp_path: Path, words: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = examples(kind, 40)
    model, task = model_and_task(family, tmp_path, train)
    encoded = encode(train, words, task)
    before = gradient(model, encoded, task, probe.RIDGE)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not n.startswith("head.")}
    probe.probe_head(model, encoded, task, 0, 8)
    assert gradient(model, encoded, task, probe.RIDGE) < 1e-3 * before
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    monkeypatch.setattr(probe, "RIDGE", 0.01)  # nearly free: then it fits what it was shown
    loose = task.loss(example_logits(model, encoded, task, 0, 8), collate(encoded, task, 0)["targets"])
    probe.probe_head(model, encoded, task, 0, 8)
    fitted = task.loss(example_logits(model, encoded, task, 0, 8), collate(encoded, task, 0)["targets"])
    assert fitted < 0.7 * loose


def test_the_start_depends_on_no_seed_but_a_random_one_does(tmp_path: Path, words: Any) -> None:
    train, found = examples(count=24), {}
    for start in ("probe", "random"):
        for seed in (0, 1):
            config = QUICK.replace(head_start=start, seed=seed, epochs=1, lr=0.0, gate_lr=0.0, task_adapter="none")
            made, _, done = adapt(tiny_model("bert"), {}, train, train, config, words, quiet=True)
            assert done["metrics"]["best_step"] == 0  # nothing was better than where it began
            found[start, seed] = made.head.weight
    assert torch.allclose(found["probe", 0], found["probe", 1], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found["random", 0], found["random", 1], rtol=1e-2)


def test_of_many_examples_some(tmp_path: Path, words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train, seen = examples(count=40), []
    model, task = model_and_task("bert", tmp_path, train)
    monkeypatch.setattr(probe, "EXAMPLES", 16)
    real = probe.pooled_states
    monkeypatch.setattr(probe, "pooled_states", lambda m, e, *rest: seen.append(len(e)) or real(m, e, *rest))
    probe.probe_head(model, encode(train, words, task), task, 0, 8)
    assert seen == [16]
