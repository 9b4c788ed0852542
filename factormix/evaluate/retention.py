"""Retention: how much of the dense model's accuracy a sparse model keeps, over the tasks that can tell.

    retention    = sum over counting tasks of the model's accuracy / sum of the dense model's
    above_chance = the same with each task's chance level taken off first: the harder figure

A task counts only where the dense model is at least 5 standard errors above chance; on the others both models guess,
and a ratio of guesses is near 1 whatever was lost. Each is kept apart as "not informative". The intervals are of the
paired bootstrap: each task's questions are drawn with replacement, the same ones for both models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INFORMATIVE = 5.0  # standard errors above chance from which a task counts
RESAMPLES = 2000  # bootstrap draws
LEVEL = 0.95  # of the interval


@dataclass(frozen=True)
class TaskScore:
    """Answers of a model, and of its dense base where there is one, to the same n questions.

    Attributes:
        kind: "choice" or "last-word".
        chance: accuracy of guessing, 0 to 1.
        model: (n,) float, 1 where the model was right, else 0.
        base: (n,) the same of the dense model, or None.
    """

    kind: str
    chance: float
    model: Tensor
    base: Tensor | None = None

    @property
    def informative(self) -> bool | None:
        """Whether the dense model is at least `INFORMATIVE` standard errors above chance; None without it."""
        if self.base is None:
            return None
        above = float(self.base.double().mean()) - self.chance
        return above > 0 and above >= INFORMATIVE * standard_error(self.base)

    def to_dict(self) -> dict[str, Any]:
        """The entry ``tasks.<task>`` of docs/json.md."""
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
    """What is kept, pooled over tasks; each interval is (low, high), 95 %.

    Attributes:
        retention, interval: ratio of summed accuracies.
        above_chance, above_chance_interval: ratio of summed accuracies less chance.
        tasks: the tasks that counted.
        not_informative: the others.
    """

    retention: float
    interval: tuple[float, float]
    above_chance: float
    above_chance_interval: tuple[float, float]
    tasks: tuple[str, ...]
    not_informative: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """An entry of ``retention`` of docs/json.md."""
        return {
            "retention": self.retention,
            "interval": list(self.interval),
            "above_chance": self.above_chance,
            "above_chance_interval": list(self.above_chance_interval),
            "tasks": list(self.tasks),
            "not_informative": list(self.not_informative),
        }


def standard_error(right: Tensor) -> float:
    """Standard error of the accuracy of answers (n,) that are 0 or 1: sqrt(p (1 - p) / n)."""
    p = float(right.double().mean())
    return math.sqrt(p * (1 - p) / len(right))


def pooled_retention(tasks: Mapping[str, TaskScore], seed: int = 0, resamples: int = RESAMPLES) -> Retention | None:
    """Retention over the tasks that count; None when none does, or no dense model was asked.

    Args:
        tasks: by name.
        seed: of the bootstrap.
        resamples: how many draws.
    """
    counting = {name: task for name, task in tasks.items() if task.informative}
    if not counting:
        return None
    generator = torch.Generator().manual_seed(seed)
    chance = sum(task.chance for task in counting.values())
    model, base = (sum(float(_of(task, who).mean()) for task in counting.values()) for who in ("model", "base"))
    drawn_model, drawn_base = torch.zeros(2, resamples, dtype=torch.float64)
    for task in counting.values():
        n = len(task.model)
        rows = torch.randint(n, (resamples, n), generator=generator)  # (D, n): the same for both models
        drawn_model += _of(task, "model")[rows].mean(1)
        drawn_base += _of(task, "base")[rows].mean(1)
    return Retention(
        retention=model / base,
        interval=_interval(drawn_model / drawn_base.clamp_min(1e-12)),
        above_chance=(model - chance) / (base - chance),
        above_chance_interval=_interval((drawn_model - chance) / (drawn_base - chance).clamp_min(1e-12)),
        tasks=tuple(counting),
        not_informative=tuple(name for name in tasks if name not in counting),
    )


def _of(task: TaskScore, who: str) -> Tensor:
    """(n,) float64 answers of "model" or "base"."""
    return getattr(task, who).double()  # type: ignore[no-any-return]


def _interval(drawn: Tensor) -> tuple[float, float]:
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(drawn, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
