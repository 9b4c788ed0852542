"""Define a task of stage 2: its labels and metric, the loss of a batch, and the meaning of its logits."""

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
THRESHOLD = 0.5  # multi-label tasks predict every label whose probability is above this


@dataclass(frozen=True)
class Task:
    """One task, as task.json stores it.

    Attributes:
        kind: one of `KINDS`, or "causal-lm" (prompts with targets), or "text" (plain text, which trains only gates).
        labels: the classes in the order of the head's outputs; empty for tasks without classes.
        mean, scale: mean and standard deviation of a regression's training targets. The head learns
            (target - mean) / scale.
        window: the most tokens of an example; longer examples are cut.
        pooling: state that the head reads: "last", "mean" or "first"; "" without a head.

    Raises:
        FactorMixError: an unknown kind.
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
            FactorMixError: there are fewer than two classes, or all targets are equal.
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
            raise FactorMixError(f"{train.name}: every target is {train.labels[0]}, so there is nothing to learn.")
        return cls(train.kind, (), float(targets.mean()), scale, window, pooling)

    @property
    def outputs(self) -> int:
        """Number of the head's outputs; 0 for a task without a head."""
        if self.kind in LANGUAGE_KINDS:
            return 0
        return len(self.labels) or 1

    @property
    def metric(self) -> str:
        """The metric by which the best checkpoint is chosen."""
        return METRIC[self.kind]

    def better(self, metrics: Mapping[str, float], than: Mapping[str, float] | None) -> bool:
        """True if a checkpoint with these metrics is better than another. If they are equal, the loss decides."""
        if than is None:
            return True
        sign = -1 if self.metric in LOWER_IS_BETTER else 1
        one, other = (sign * m[self.metric] for m in (metrics, than))
        return one > other or (one == other and metrics["loss"] < than["loss"])

    def check_labels(self, examples: Labelled) -> None:
        """Check that examples are of the task's kind and have only labels that training has seen.

        Raises:
            FactorMixError: they are of another kind, or they have other labels.
        """
        if examples.kind != self.kind:
            raise FactorMixError(f"{examples.name} is {examples.kind}; allowed: {self.kind}, the kind of the task.")
        unknown = [label for label in examples.classes() if label not in self.labels]
        if unknown:
            raise FactorMixError(
                f"{examples.name} has the labels {unknown[:5]}, which the training examples lack; allowed: "
                f"{', '.join(self.labels)}."
            )

    def target(self, label: Any) -> Any:
        """The target of the loss for a label: a number, or for multi-label a row of 0 and 1."""
        if self.kind == "single-label":
            return self.labels.index(label)
        if self.kind == "multi-label":
            return [float(known in label) for known in self.labels]
        if self.kind == "regression":
            return (label - self.mean) / self.scale
        return label

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of a batch, a scalar.

        Args:
            logits: (B, outputs). For multiple choice (B, most choices), with -inf where a question has fewer.
            targets: (B,) int64; for regression (B,) float, for multi-label (B, labels) float.
        """
        if self.kind == "multi-label":
            return nn.functional.binary_cross_entropy_with_logits(logits, targets)
        if self.kind == "regression":
            return nn.functional.mse_loss(logits[:, 0], targets)
        return nn.functional.cross_entropy(logits, targets)

    def predict(self, logits: Tensor) -> list[Any]:
        """The prediction of each row of logits (B, ...), in the form of `Labelled.labels`."""
        if self.kind == "single-label":
            return [self.labels[i] for i in logits.argmax(-1).tolist()]
        if self.kind == "multi-label":
            chosen = (logits.sigmoid() > THRESHOLD).tolist()
            return [tuple(label for label, yes in zip(self.labels, row) if yes) for row in chosen]
        if self.kind == "regression":
            return [value * self.scale + self.mean for value in logits[:, 0].double().tolist()]
        return logits.argmax(-1).tolist()  # type: ignore[no-any-return]

    def scores(self, logits: Tensor, choices: Sequence[Sequence[str]] | None) -> list[dict[str, float]]:
        """The probabilities of each row by label or choice; empty for a regression."""
        if self.kind == "regression":
            return [{} for _ in logits]
        p = (logits.sigmoid() if self.kind == "multi-label" else logits.softmax(-1)).tolist()  # (B, outputs)
        names = choices if self.kind == "multiple-choice" and choices is not None else [self.labels] * len(p)
        return [dict(zip(row_names, row)) for row_names, row in zip(names, p)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "labels": list(self.labels), "metric": self.metric}
