"""A stage-2 model on examples: its logits, its predictions, and its metrics with the gates' mean weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from factormix.evaluate.classification import task_metrics
from factormix.mix.config import InjectConfig
from factormix.mix.examples import Example, LanguageBatches, by_example, collate
from factormix.mix.gate_means import GateMeans
from factormix.mix.losses import InjectionLoss
from factormix.mix.mix_model import MixModel
from factormix.mix.task import Task

MASK_SEED = 0  # masked language models are scored on the same masks every time


class TaskLoss:
    """The loss of one micro-batch, for `factormix.train`.

    Args:
        mix: the model, for language tasks without a wrapper.
        task: what it learns.
        mask_token: of a masked language model's tokenizer, for language tasks.
    """

    def __init__(self, mix: MixModel, task: Task, mask_token: int | None = None) -> None:
        self.task = task
        domain = mix.domains[0] if mix.domains else ""
        self.language = None if task.outputs else InjectionLoss(mix.model, domain, InjectConfig(), mask_token)

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The scalar "task"; `batch` is `collate`'s, or for language tasks `LanguageBatches`'."""
        if self.language is not None:
            return {"task": self.language.knowledge(_with_logits(model), batch)}
        logits = by_example(model(batch["input_ids"], batch["attention_mask"]), batch["sizes"])  # (B, ...)
        return {"task": self.task.loss(logits, batch["targets"])}


def _with_logits(model: nn.Module) -> Any:
    """`model` as a transformers model answers."""
    return lambda input_ids, attention_mask, **_: SimpleNamespace(logits=model(input_ids, attention_mask))


def example_logits(mix: MixModel, examples: Sequence[Example], task: Task, pad: int, batch_size: int) -> Tensor:
    """Logits of every example, in order: (B, outputs), for multiple choice (B, most choices) with -inf; on the CPU."""
    width = max(len(e.rows) for e in examples) if task.kind == "multiple-choice" else task.outputs
    out = torch.full((len(examples), width), float("-inf"))
    for chosen, ids, mask, sizes in in_batches(mix, examples, task, pad, batch_size):
        logits = by_example(MixModel.forward(mix, ids, mask).cpu(), sizes)  # (b, ...)
        out[torch.tensor(chosen), : logits.shape[1]] = logits
    return out


def in_batches(
    mix: MixModel, examples: Sequence[Example], task: Task, pad: int, batch_size: int
) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
    """Examples of like length together: their numbers, ids and mask (N, L) on the model's device, and sizes (b,).

    Eval mode and no gradients until the last batch is through.
    """
    order = sorted(range(len(examples)), key=lambda i: max(map(len, examples[i].rows)))
    was_training = mix.training
    mix.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                batch = collate([examples[i] for i in chosen], task, pad)
                ids, mask = (batch[name].to(mix.device) for name in ("input_ids", "attention_mask"))
                yield chosen, ids, mask, batch["sizes"]
    finally:
        mix.train(was_training)


def score_examples(
    mix: MixModel, examples: Sequence[Example], right: Sequence[Any], task: Task, pad: int, batch_size: int
) -> dict[str, Any]:
    """Metrics of labelled examples.

    Args:
        examples: encoded, with targets.
        right: their labels, as `Labelled.labels` has them.

    Returns:
        "loss", those of `task_metrics`, "n", and "gates" (see `GateMeans.to_dict`).
    """
    with GateMeans(mix) as means:
        logits = example_logits(mix, examples, task, pad, batch_size)
    whole = task.kind in ("single-label", "multiple-choice")
    targets = torch.tensor([e.target for e in examples], dtype=torch.int64 if whole else torch.float32)
    metrics = task_metrics(task.kind, task.predict(logits), right, task.labels)
    return {"loss": float(task.loss(logits, targets)), **metrics, "n": len(examples), "gates": means.to_dict()}


def score_language(mix: MixModel, batches: LanguageBatches, loss: TaskLoss) -> dict[str, Any]:
    """Metrics of prompts or plain text: "loss" (nats a token), "perplexity", "n" tokens (of a masked language
    model: those that may be masked), "gates"."""
    assert loss.language is not None
    was_training = mix.training
    mix.eval()
    total, tokens = 0.0, 0
    forward = _with_logits(lambda ids, mask: MixModel.forward(mix, ids, mask))  # type: ignore[arg-type]
    try:
        with torch.no_grad(), torch.random.fork_rng(), GateMeans(mix) as means:
            torch.manual_seed(MASK_SEED)
            for row in batches.rows:
                batch = {name: tensor.to(mix.device) for name, tensor in row.items()}
                count = int(batch["counted"][:, 1:].sum())
                total += count * float(loss.language.knowledge(forward, batch))
                tokens += count
    finally:
        mix.train(was_training)
    mean = total / max(tokens, 1)
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "n": tokens, "gates": means.to_dict()}
