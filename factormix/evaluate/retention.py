"""Compute retention: how much of the dense model's accuracy a sparse model keeps, over the informative tasks.

    retention    = sum over informative tasks of the model's accuracy / sum of the dense model's
    above_chance = the same after subtracting each task's chance level, which is the stricter figure

A task is informative if the dense model is at least 5 standard errors above chance. On other tasks both models guess,
so the ratio is near 1 no matter how much was lost. Those tasks are listed as "not informative". The intervals come from
a paired bootstrap: each task's questions are drawn with replacement, the same questions for both models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INFORMATIVE = 5.0  # standard errors above chance that make a task informative
RESAMPLES = 2000  # bootstrap draws
LEVEL = 0.95  # confidence level of the intervals


@dataclass(frozen=True)
class TaskScore:
    """Answers of a model to n questions, and of its dense base if there is one.

    Attributes:
        kind: "choice" or "last-word".
        chance: accuracy of guessing, 0 to 1.
        model: (n,) float32, 1 where the model was right, else 0.
        base: (n,) float32, the same for the dense model, or None.
    """

    kind: str
    chance: float
    model: Tensor
    base: Tensor | None = None

    @property
    def informative(self) -> bool | None:
        """True if the dense model is at least `INFORMATIVE` standard errors above chance. None without a base."""
        if self.base is None:
            return None
        above = float(self.base.double().mean()) - self.chance
        return above > 0 and above >= INFORMATIVE * standard_error(self.base)

    def to_dict(self) -> dict[str, Any]:
        """The entry ``tasks.<task>``, which docs/json.md describes."""
        return {
            "kind": self.kind,
            "base": None if self.base is None else float(self.base.double().mean()),
            "model": float(self.model.double().mean()),
            "chance": self.chance,
            "n": len(self.model),
            "stderr": standard_error(self.model),
            "base_stderr": None if self.base is None else standard_error(self.base),
            "informative": self.informative,
        }


@dataclass(frozen=True)
class Retention:
    """Retention pooled over tasks. Each interval is (low, high), at 95 %.

    Attributes:
        retention, interval: ratio of the summed accuracies.
        above_chance, above_chance_interval: ratio of the summed accuracies minus chance.
        tasks: names of the informative tasks.
        not_informative: names of all other tasks.
    """

    retention: float
    interval: tuple[float, float]
    above_chance: float
    above_chance_interval: tuple[float, float]
    tasks: tuple[str, ...]
    not_informative: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """An entry of ``retention``, which docs/json.md describes."""
        return {
            "retention": self.retention,
            "interval": list(self.interval),
            "above_chance": self.above_chance,
            "above_chance_interval": list(self.above_chance_interval),
            "tasks": list(self.tasks),
            "not_informative": list(self.not_informative),
        }


def standard_error(right: Tensor) -> float:
    """Standard error of an accuracy, sqrt(p (1 - p) / n), for answers (n,) that are 0 or 1."""
    p = float(right.double().mean())
    return math.sqrt(p * (1 - p) / len(right))


def pooled_retention(tasks: Mapping[str, TaskScore], seed: int = 0, resamples: int = RESAMPLES) -> Retention | None:
    """Retention over the informative tasks. None if there is none, or if no dense model was asked.

    Args:
        tasks: the answers by task.
        seed: seed of the bootstrap.
        resamples: number of bootstrap draws.
    """
    informative = {name: task for name, task in tasks.items() if task.informative}
    if not informative:
        return None
    generator = torch.Generator().manual_seed(seed)
    chance = sum(task.chance for task in informative.values())
    model, base = (sum(float(_right(task, who).mean()) for task in informative.values()) for who in ("model", "base"))
    drawn_model, drawn_base = torch.zeros(2, resamples, dtype=torch.float64)
    for task in informative.values():
        n = len(task.model)
        rows = torch.randint(n, (resamples, n), generator=generator)  # (D, n), the same for both models
        drawn_model += _right(task, "model")[rows].mean(1)
        drawn_base += _right(task, "base")[rows].mean(1)
    return Retention(
        retention=model / base,
        interval=_interval(drawn_model / drawn_base.clamp_min(1e-12)),
        above_chance=(model - chance) / (base - chance),
        above_chance_interval=_interval((drawn_model - chance) / (drawn_base - chance).clamp_min(1e-12)),
        tasks=tuple(informative),
        not_informative=tuple(name for name in tasks if name not in informative),
    )


def _right(task: TaskScore, who: str) -> Tensor:
    """The answers of "model" or "base", (n,) float64."""
    return getattr(task, who).double()  # type: ignore[no-any-return]


def _interval(drawn: Tensor) -> tuple[float, float]:
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(drawn, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
