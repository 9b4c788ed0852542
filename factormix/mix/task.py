"""What a stage-2 task is: its labels and metric, the loss of a batch, and what its logits mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from factormix.data.labelled import KINDS, Labelled
from factormix.mix.adapt_config import LANGUAGE_KINDS
from factormix.run.errors import FactorMixError, choose

METRIC = {
    "single-label": "accuracy",
    "multi-label": "f1_micro",
    "regression": "rmse",
    "multiple-choice": "accuracy",
    "causal-lm": "perplexity",
    "text": "perplexity",
}
LOWER_IS_BETTER = ("rmse", "perplexity")
THRESHOLD = 0.5  # multi-label: a label whose probability is above it is predicted


@dataclass(frozen=True)
class Task:
    """One task, as task.json keeps it.

    Attributes:
        kind: one of `KINDS`, or "causal-lm" (prompts with targets), or "text" (the gates alone, on plain text).
        labels: the classes in the order of the head's outputs; empty where there are none.
        mean, scale: of the training targets of a regression: the head learns (target - mean) / scale.
        window: tokens of an example; longer ones are cut.
        pooling: token that the head reads, "last", "mean" or "first"; "" without a head.
    """

    kind: str
    labels: tuple[str, ...] = ()
    mean: float = 0.0
    scale: float = 1.0
    window: int = 256
    pooling: str = ""

    def __post_init__(self) -> None:
        choose("task", self.kind, (*KINDS, *LANGUAGE_KINDS))
        object.__setattr__(self, "labels", tuple(self.labels))

    @classmethod
    def of(cls, train: Labelled, window: int, pooling: str) -> Task:
        """The task of a training set.

        Raises:
            FactorMixError: fewer than two classes, or targets that are all the same.
        """
        assert train.kind is not None and train.labels is not None
        labels = tuple(train.classes())
        if train.kind in ("single-label", "multi-label") and len(labels) < (2 if train.kind == "single-label" else 1):
            raise FactorMixError(f"{train.name} has the labels {list(labels)}; a task needs two or more classes.")
        if train.kind != "regression":
            return cls(train.kind, labels, window=window, pooling=pooling)
        targets = torch.tensor(train.labels, dtype=torch.float64)
        scale = float(targets.std(correction=0))
        if scale == 0:
            raise FactorMixError(f"{train.name}: every target is {train.labels[0]}; there is nothing to learn.")
        return cls(train.kind, (), float(targets.mean()), scale, window, pooling)

    @property
    def outputs(self) -> int:
        """Outputs of the head; 0 for a task without one."""
        if self.kind in LANGUAGE_KINDS:
            return 0
        return len(self.labels) or 1

    @property
    def metric(self) -> str:
        """By which the best checkpoint is chosen."""
        return METRIC[self.kind]

    def better(self, metrics: Mapping[str, float], than: Mapping[str, float] | None) -> bool:
        """Whether a checkpoint with these metrics is better than another; the loss decides between equals."""
        if than is None:
            return True
        sign = -1 if self.metric in LOWER_IS_BETTER else 1
        mine, other = (sign * m[self.metric] for m in (metrics, than))
        return mine > other or (mine == other and metrics["loss"] < than["loss"])

    def check_labels(self, examples: Labelled) -> None:
        """Refuse examples of another kind or with labels that training has not seen.

        Raises:
            FactorMixError: names both.
        """
        if examples.kind != self.kind:
            raise FactorMixError(f"{examples.name} is {examples.kind}; the task is {self.kind}.")
        unknown = [label for label in examples.classes() if label not in self.labels]
        if unknown:
            raise FactorMixError(
                f"{examples.name} has the labels {unknown[:5]}, which the training examples have not: {self.labels}."
            )

    def target(self, label: Any) -> Any:
        """What the loss is given for a label: a number, or for multi-label a row of 0 and 1."""
        if self.kind == "single-label":
            return self.labels.index(label)
        if self.kind == "multi-label":
            return [float(each in label) for each in self.labels]
        if self.kind == "regression":
            return (label - self.mean) / self.scale
        return label

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean over a batch, a scalar.

        Args:
            logits: (B, outputs); multiple choice: (B, most choices), -inf where a question has fewer.
            targets: (B,) int64, or float (B,) for regression, (B, labels) for multi-label.
        """
        if self.kind == "multi-label":
            return nn.functional.binary_cross_entropy_with_logits(logits, targets)
        if self.kind == "regression":
            return nn.functional.mse_loss(logits[:, 0], targets)
        return nn.functional.cross_entropy(logits, targets)

    def predict(self, logits: Tensor) -> list[Any]:
        """What each row of logits (B, ...) says, in the terms of `Labelled.labels`."""
        if self.kind == "single-label":
            return [self.labels[i] for i in logits.argmax(-1).tolist()]
        if self.kind == "multi-label":
            chosen = (logits.sigmoid() > THRESHOLD).tolist()
            return [tuple(label for label, yes in zip(self.labels, row) if yes) for row in chosen]
        if self.kind == "regression":
            return [value * self.scale + self.mean for value in logits[:, 0].double().tolist()]
        return logits.argmax(-1).tolist()  # type: ignore[no-any-return]

    def scores(self, logits: Tensor, choices: Sequence[Sequence[str]] | None) -> list[dict[str, float]]:
        """Probabilities of each row by label or choice; empty for a regression."""
        if self.kind == "regression":
            return [{} for _ in logits]
        p = (logits.sigmoid() if self.kind == "multi-label" else logits.softmax(-1)).tolist()  # (B, outputs)
        names = choices if self.kind == "multiple-choice" and choices is not None else [self.labels] * len(p)
        return [dict(zip(of_row, row)) for of_row, row in zip(names, p)]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "labels": list(self.labels), "metric": self.metric}
