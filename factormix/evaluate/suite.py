"""Several texts, one verdict: perplexity and agreement by text, and their means for in-domain and foreign text apart.

    evaluation = evaluate(model, dense, {"brown": packed_brown, "foldoc": packed_foldoc}, in_domain=["brown"])
    write_json(path, evaluation.to_dict())          # docs/json.md

A text is in-domain when the calibration came from the same source (other documents of it), foreign otherwise. A model
that keeps what it was calibrated on and loses the rest looks fine until the two are told apart.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from factormix.data.packing import Packed
from factormix.evaluate.asked import Asked
from factormix.evaluate.choice import CORE_TASKS, LIMIT, answer_tasks
from factormix.evaluate.last_word import Passage, last_words_for
from factormix.evaluate.perplexity import TextScore, evaluate_text_for
from factormix.evaluate.retention import TaskScore, pooled_retention
from factormix.run.errors import FactorMixError, choose

SCHEMA_VERSION = 1
LAST_WORD_TOKENS = 20_480  # of all passages of a suite together
_BASE = "dense base"  # no name of a model of ours


@dataclass(frozen=True)
class Suite:
    """What ``factormix eval --suite NAME`` runs; everything comes from assets.

    Attributes:
        texts: scored by perplexity and agreement.
        prose: those whose passages ask for their last word.
        tasks: multiple choice, see `factormix.evaluate.choice`.
    """

    texts: tuple[str, ...]
    prose: tuple[str, ...]
    tasks: tuple[str, ...] = ()


_TEXTS = ("asset:brown-heldout", "asset:handbook-test", "asset:foldoc-test", "asset:pubmed-test")
_PROSE = ("asset:brown-heldout", "asset:handbook-test", "asset:pubmed-test")
SUITES = {"core": Suite(_TEXTS, _PROSE, CORE_TASKS), "text": Suite(_TEXTS, _PROSE)}


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model on several texts, by the stem of the text's file."""

    texts: dict[str, TextScore]
    in_domain: tuple[str, ...] = ()
    """texts of the source the calibration came from; every other text is foreign"""
    tasks: dict[str, TaskScore] = field(default_factory=dict)
    """answers by task: multiple choice, and last words as "last-word <stem>"; empty unless asked for"""
    seed: int = 0
    """of the bootstrap"""
    recall: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """``{stem: {"base", "model": a RecallScore}}`` where facts were asked beside"""
    predicts: str = "next"
    """of the texts: the "next" token, or "masked" ones"""

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

    def retention(self) -> dict[str, Any]:
        """Pooled over all tasks, and over those of each kind; None where none counts."""
        groups: dict[str, dict[str, TaskScore]] = {"all": self.tasks}
        for key, kind in (("choice", "choice"), ("last_word", "last-word")):
            groups[key] = {name: task for name, task in self.tasks.items() if task.kind == kind}
        pooled = {key: pooled_retention(tasks, self.seed) for key, tasks in groups.items()}
        return {key: None if each is None else each.to_dict() for key, each in pooled.items()}

    def to_dict(self) -> dict[str, Any]:
        """The JSON of ``factormix eval``, as docs/json.md has it."""
        return {
            "schema_version": SCHEMA_VERSION,
            "predicts": self.predicts,
            "perplexity": {stem: score.perplexity_dict() for stem, score in self.texts.items()},
            "agreement": {stem: score.agreement_dict() for stem, score in self.texts.items()},
            "tasks": {name: task.to_dict() for name, task in self.tasks.items()},
            "retention": self.retention(),
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
    texts: Mapping[str, Packed | Asked],
    *,
    in_domain: Collection[str] = (),
    batch_size: int | None = None,
    seed: int = 0,
    quiet: bool = True,
) -> Evaluation:
    """Score `model` on every text, beside `base` where one is given.

    Args:
        model: a causal language model, or a masked one.
        base: the dense model it was made from, or None.
        texts: packed texts by the stem of their file; for a masked language model what `asked.masked_tokens` made of
            each.
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
    texts: Mapping[str, Packed | Asked],
    *,
    in_domain: Collection[str] = (),
    batch_size: int | None = None,
    seed: int = 0,
    quiet: bool = True,
    tasks: Mapping[str, Mapping[str, TaskScore]] | None = None,
) -> dict[str, Evaluation]:
    """`evaluate` for several models by name (FactorMix beside its baselines); the base runs once for all of them.

    `tasks` are what `answer_for` gave.
    """
    if not texts:
        raise FactorMixError("no text to evaluate on: give at least one.")
    for stem in in_domain:
        choose("in-domain text", stem, texts)
    scores: dict[str, dict[str, TextScore]] = {name: {} for name in models}
    for stem, text in texts.items():
        for name, score in evaluate_text_for(models, text, base, batch_size, seed, quiet).items():
            scores[name][stem] = score
    answered = tasks or {}
    masked = any(isinstance(text, Asked) and text.token == "masked" for text in texts.values())
    predicts = "masked" if masked else "next"
    return {
        name: Evaluation(of_model, tuple(in_domain), dict(answered.get(name, {})), seed, predicts=predicts)
        for name, of_model in scores.items()
    }


def answer_for(
    models: Mapping[str, nn.Module],
    base: nn.Module | None,
    passages: Mapping[str, Sequence[Passage]],
    tasks: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    limit: int = LIMIT,
    seed: int = 0,
    quiet: bool = True,
) -> dict[str, dict[str, TaskScore]]:
    """Last words and multiple choice of several models by name, each beside the base's answers, which are got once.

    Args:
        models: causal language models.
        base: the dense model they were made from, or None.
        passages: of `last_word.cut_passages`, by the stem of their text.
        tasks: names for `choice.answer_tasks`; they need `tokenizer`.
        tokenizer: the models'.
        limit: questions of a task, at most.
        seed: of which questions are asked.
        quiet: no progress line.
    """
    everyone = {**models} if base is None else {**models, _BASE: base}
    answers: dict[str, tuple[str, float, dict[str, Tensor]]] = {}  # by task: kind, chance, who was right where
    for stem, some in passages.items():
        answers[f"last-word {stem}"] = ("last-word", 0.0, last_words_for(everyone, some, quiet))
    if tasks:
        assert tokenizer is not None
        found = answer_tasks(everyone, tokenizer, tasks, limit, seed, quiet)
        for name in tasks:
            right = {who: found[who][name].right for who in everyone}
            answers[name] = ("choice", next(iter(found.values()))[name].chance, right)
    return {
        who: {
            name: TaskScore(kind, chance, right[who], right.get(_BASE))
            for name, (kind, chance, right) in answers.items()
        }
        for who in models
    }
