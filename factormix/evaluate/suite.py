"""Several texts, one verdict: perplexity and agreement by text, and their means for in-domain and foreign text apart.

    evaluation = evaluate(model, dense, {"brown": packed_brown, "foldoc": packed_foldoc}, in_domain=["brown"])
    write_json(path, evaluation.to_dict())          # docs/json.md

A text is in-domain when the calibration came from the same source (other documents of it), foreign otherwise. A model
that keeps what it was calibrated on and loses the rest looks fine until the two are told apart.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from factormix.data.packing import Packed
from factormix.evaluate.perplexity import TextScore, evaluate_text_for
from factormix.run.errors import FactorMixError, choose

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model on several texts, by the stem of the text's file."""

    texts: dict[str, TextScore]
    in_domain: tuple[str, ...] = ()
    """texts of the source the calibration came from; every other text is foreign"""
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """``{task: {base, model, chance, n, stderr}}`` where a harness ran tasks beside"""
    recall: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """``{stem: {"base", "model": a RecallScore}}`` where facts were asked beside"""

    @property
    def foreign(self) -> tuple[str, ...]:
        """Texts of other sources than the calibration's."""
        return tuple(stem for stem in self.texts if stem not in self.in_domain)

    def mean_ratio(self, stems: Iterable[str] | None = None) -> float | None:
        """Geometric mean of the perplexity ratios of `stems` (None: all texts); None without texts or without base."""
        ratios = [self.texts[stem].ratio for stem in (self.texts if stems is None else stems)]
        known = [ratio for ratio in ratios if ratio is not None]
        if not known or len(known) < len(ratios):
            return None
        return math.exp(sum(math.log(ratio) for ratio in known) / len(known))

    def to_dict(self) -> dict[str, Any]:
        """The JSON of ``factormix eval``, as docs/json.md has it."""
        return {
            "schema_version": SCHEMA_VERSION,
            "perplexity": {stem: score.perplexity_dict() for stem, score in self.texts.items()},
            "agreement": {stem: score.agreement_dict() for stem, score in self.texts.items()},
            "tasks": self.tasks,
            "recall": self.recall,
            "in_domain": list(self.in_domain),
            "foreign": list(self.foreign),
            "mean_ratio": {
                "all": self.mean_ratio(),
                "in_domain": self.mean_ratio(self.in_domain),
                "foreign": self.mean_ratio(self.foreign),
            },
        }


def evaluate(
    model: nn.Module,
    base: nn.Module | None,
    texts: Mapping[str, Packed],
    *,
    in_domain: Collection[str] = (),
    batch_size: int | None = None,
    seed: int = 0,
    quiet: bool = True,
) -> Evaluation:
    """Score `model` on every text, beside `base` where one is given.

    Args:
        model: a causal language model.
        base: the dense model it was made from, or None.
        texts: packed texts by the stem of their file.
        in_domain: the stems whose source the calibration came from.
        batch_size: windows a forward; None takes what fits 256 MiB of logits.
        seed: of the bootstrap.
        quiet: no progress line.
    """
    options: dict[str, Any] = {"in_domain": in_domain, "batch_size": batch_size, "seed": seed, "quiet": quiet}
    return evaluate_for({"model": model}, base, texts, **options)["model"]


def evaluate_for(
    models: Mapping[str, nn.Module],
    base: nn.Module | None,
    texts: Mapping[str, Packed],
    *,
    in_domain: Collection[str] = (),
    batch_size: int | None = None,
    seed: int = 0,
    quiet: bool = True,
) -> dict[str, Evaluation]:
    """`evaluate` for several models by name (FactorMix beside its baselines); the base runs once for all of them."""
    if not texts:
        raise FactorMixError("no text to evaluate on: give at least one.")
    for stem in in_domain:
        choose("in-domain text", stem, texts)
    scores: dict[str, dict[str, TextScore]] = {name: {} for name in models}
    for stem, packed in texts.items():
        for name, score in evaluate_text_for(models, packed, base, batch_size, seed, quiet).items():
            scores[name][stem] = score
    return {name: Evaluation(of_model, tuple(in_domain)) for name, of_model in scores.items()}
