"""Run a stage-2 model on examples: its loss, its logits, and its metrics with the gates' mean weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from factormix.evaluate.asked import MASKED_SHARE
from factormix.evaluate.classification import task_metrics
from factormix.mix.examples import Example, LanguageBatches, by_example, collate
from factormix.mix.gate_means import GateMeans
from factormix.mix.losses import KnowledgeLoss
from factormix.mix.mix_model import MixModel
from factormix.mix.task import Task

MASK_SEED = 0  # seed of the masks on which masked language models are scored, the same every time


class TaskLoss:
    """The loss of one micro-batch, for `factormix.train`.

    Args:
        mix: the model.
        task: the task that it learns.
        mask_token: for language tasks of a masked language model, id of the mask token.
        share: for these, the share of a text's tokens that must be predicted, 0 to 1. The default is BERT's.
    """

    def __init__(self, mix: MixModel, task: Task, mask_token: int | None = None, share: float = MASKED_SHARE) -> None:
        self.task = task
        self.language = None if task.outputs else KnowledgeLoss(mix.model, mask_token, share)

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The scalar "task". `batch` comes from `collate`, or for language tasks from `LanguageBatches`."""
        if self.language is not None:
            return {"task": self.language(_with_logits(model), batch)}
        logits = by_example(model(batch["input_ids"], batch["attention_mask"]), batch["sizes"])  # (B, ...)
        return {"task": self.task.loss(logits, batch["targets"])}


def _with_logits(model: nn.Module) -> Any:
    """A function that calls `model` and answers in the form of a transformers model."""
    return lambda input_ids, attention_mask, **_: SimpleNamespace(logits=model(input_ids, attention_mask))


def example_logits(mix: MixModel, examples: Sequence[Example], task: Task, pad: int, batch_size: int) -> Tensor:
    """Logits of every example, in order, on the CPU: (B, outputs) float32.

    For multiple choice they are (B, most choices), with -inf where an example has fewer choices.
    """
    width = max(len(e.rows) for e in examples) if task.kind == "multiple-choice" else task.outputs
    out = torch.full((len(examples), width), float("-inf"))
    for chosen, ids, mask, sizes in in_batches(mix, examples, task, pad, batch_size):
        logits = by_example(MixModel.forward(mix, ids, mask).cpu(), sizes)  # (b, ...)
        out[torch.tensor(chosen), : logits.shape[1]] = logits
    return out


def in_batches(
    mix: MixModel, examples: Sequence[Example], task: Task, pad: int, batch_size: int
) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
    """Yield batches of examples of similar length. The model is in eval mode without gradients until the last one.

    Yields:
        The examples' numbers, their ids and mask (N, L) int64 on the model's device, and the number of rows of each
        example (b,) int64.
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
        mix: the model.
        examples: encoded examples with targets.
        right: their labels, in the form of `Labelled.labels`.
        task: the task.
        pad: id of the padding token.
        batch_size: examples that run together.

    Returns:
        "loss", the metrics of `task_metrics`, "n" (the number of examples), and "gates" (see `GateMeans.to_dict`).
    """
    with GateMeans(mix) as means:
        logits = example_logits(mix, examples, task, pad, batch_size)
    whole = task.kind in ("single-label", "multiple-choice")
    targets = torch.tensor([e.target for e in examples], dtype=torch.int64 if whole else torch.float32)
    metrics = task_metrics(task.kind, task.predict(logits), right, task.labels)
    return {"loss": float(task.loss(logits, targets)), **metrics, "n": len(examples), "gates": means.to_dict()}


def score_language(mix: MixModel, batches: LanguageBatches, loss: TaskLoss) -> dict[str, Any]:
    """Metrics of prompts or plain text.

    Returns:
        "loss" (nats per token), "perplexity", "n" (number of tokens; for a masked language model, of those that may be
        masked), and "gates" (see `GateMeans.to_dict`).
    """
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
                total += count * float(loss.language(forward, batch))
                tokens += count
    finally:
        mix.train(was_training)
    mean = total / max(tokens, 1)
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "n": tokens, "gates": means.to_dict()}
