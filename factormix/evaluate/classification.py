"""Compute the metrics of labelled tasks from predictions and right answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def task_metrics(
    kind: str, predicted: Sequence[Any], right: Sequence[Any], labels: Sequence[str] = ()
) -> dict[str, float]:
    """The metrics of one kind of task, by name.

    ===============  ===========================================================================================
    single-label     accuracy, f1_macro (mean over `labels` of their F1)
    multi-label      accuracy (whole sets), f1_micro, f1_macro
    regression       rmse, mae, pearson (0 where either side is constant)
    multiple-choice  accuracy
    ===============  ===========================================================================================

    Args:
        kind: the kind of task, one of the table's.
        predicted, right: one value per example, in the form of `factormix.data.labelled.Labelled.labels`; not empty.
        labels: all classes, for single-label and multi-label tasks.
    """
    count = len(right)
    if kind == "regression":
        return _regression(predicted, right)
    accuracy = sum(p == r for p, r in zip(predicted, right)) / count
    if kind == "multiple-choice":
        return {"accuracy": accuracy}
    sets = [({p}, {r}) if kind == "single-label" else (set(p), set(r)) for p, r in zip(predicted, right)]
    by_label = [_f1([(label in p, label in r) for p, r in sets]) for label in labels]
    metrics = {"accuracy": accuracy, "f1_macro": sum(by_label) / len(by_label)}
    if kind == "multi-label":
        metrics["f1_micro"] = _f1([(label in p, label in r) for p, r in sets for label in labels])
    return metrics


def _f1(pairs: Sequence[tuple[bool, bool]]) -> float:
    """F1 of one class: 2 TP / (2 TP + FP + FN). It is 0 if the class neither occurs nor is predicted."""
    true = sum(p and r for p, r in pairs)
    wrong = sum(p != r for p, r in pairs)
    return 2 * true / (2 * true + wrong) if true else 0.0


def _regression(predicted: Sequence[float], right: Sequence[float]) -> dict[str, float]:
    errors = [p - r for p, r in zip(predicted, right)]
    return {
        "rmse": math.sqrt(sum(e * e for e in errors) / len(errors)),
        "mae": sum(map(abs, errors)) / len(errors),
        "pearson": _pearson(predicted, right),
    }


def _pearson(a: Sequence[float], b: Sequence[float]) -> float:
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b))
    spread = math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))
    return covariance / spread if spread else 0.0
