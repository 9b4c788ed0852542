"""Evaluate a model on several texts and tasks, with separate means for in-domain and foreign texts.

    evaluation = evaluate(model, dense, {"brown": packed_brown, "foldoc": packed_foldoc}, in_domain=["brown"])
    write_json(path, evaluation.to_dict())          # docs/json.md

A text is in-domain if the calibration text came from the same source (but other documents), and foreign otherwise. The
means are separate because a model may keep the domain it was calibrated on and lose everything else.
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
LAST_WORD_TOKENS = 20_480  # tokens of all passages of a suite together
_BASE = "dense base"  # the base's name among the models; no caller uses it


@dataclass(frozen=True)
class Suite:
    """The texts and tasks of ``factormix eval --suite NAME``. All of them come from assets.

    Attributes:
        texts: texts scored by perplexity and agreement.
        prose: texts whose passages are used for last-word accuracy.
        tasks: multiple-choice tasks, see `factormix.evaluate.choice`.
    """

    texts: tuple[str, ...]
    prose: tuple[str, ...]
    tasks: tuple[str, ...] = ()


_TEXTS = ("asset:brown-heldout", "asset:handbook-test", "asset:foldoc-test", "asset:pubmed-test")
_PROSE = ("asset:brown-heldout", "asset:handbook-test", "asset:pubmed-test")
SUITES = {"core": Suite(_TEXTS, _PROSE, CORE_TASKS), "text": Suite(_TEXTS, _PROSE)}


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model on several texts. A stem is the name of a text's file without its suffix."""

    texts: dict[str, TextScore]
    """scores by stem"""
    in_domain: tuple[str, ...] = ()
    """stems of the texts from the source of the calibration; every other text is foreign"""
    tasks: dict[str, TaskScore] = field(default_factory=dict)
    """answers by task: multiple choice, and last words as "last-word <stem>"; empty if no task was asked"""
    seed: int = 0
    """seed of the bootstrap"""
    recall: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """``{stem: {"base", "model": RecallScore.to_dict()}}``; empty if no facts were asked"""
    predicts: str = "next"
    """the tokens that are predicted: "next" or "masked" """

    @property
    def foreign(self) -> tuple[str, ...]:
        """Stems of the texts from other sources than the calibration's."""
        return tuple(stem for stem in self.texts if stem not in self.in_domain)

    def mean_ratio(self, stems: Iterable[str] | None = None) -> float | None:
        """Geometric mean of the perplexity ratios of `stems`, by default of all texts. None if a ratio is missing."""
        ratios = [self.texts[stem].ratio for stem in (self.texts if stems is None else stems)]
        known = [ratio for ratio in ratios if ratio is not None]
        if not known or len(known) < len(ratios):
            return None
        return math.exp(sum(math.log(ratio) for ratio in known) / len(known))

    def retention(self) -> dict[str, Any]:
        """Retention pooled over all tasks, and over those of each kind. None where no task is informative."""
        groups: dict[str, dict[str, TaskScore]] = {"all": self.tasks}
        for key, kind in (("choice", "choice"), ("last_word", "last-word")):
            groups[key] = {name: task for name, task in self.tasks.items() if task.kind == kind}
        pooled = {key: pooled_retention(tasks, self.seed) for key, tasks in groups.items()}
        return {key: None if retention is None else retention.to_dict() for key, retention in pooled.items()}

    def to_dict(self) -> dict[str, Any]:
        """The JSON of ``factormix eval``, which docs/json.md describes."""
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
    """Score `model` on every text, and compare it with `base` if one is given.

    Args:
        model: a causal or a masked language model.
        base: the dense model it was made from, or None.
        texts: by stem, packed texts for a causal model, results of `asked.masked_tokens` for a masked one.
        in_domain: stems of the texts from the source of the calibration.
        batch_size: windows in one forward. By default as many as fit into 256 MiB of logits.
        seed: seed of the bootstrap.
        quiet: show no progress line.

    Raises:
        FactorMixError: there is no text, `in_domain` names another text, or `evaluate_text` refuses a text or a model.
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
    """Like `evaluate`, for several models by name (FactorMix and its baselines). The base runs once for all of them.

    Args:
        models: the models by name.
        tasks: the result of `answer_for`, or None. All other arguments are those of `evaluate`.
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
        name: Evaluation(text_scores, tuple(in_domain), dict(answered.get(name, {})), seed, predicts=predicts)
        for name, text_scores in scores.items()
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
    """Ask several models for last words and multiple-choice answers. The base is asked once for all of them.

    Args:
        models: causal language models by name.
        base: the dense model they were made from, or None.
        passages: results of `last_word.cut_passages`, by the stem of their text.
        tasks: tasks for `choice.answer_tasks`, which need `tokenizer`.
        tokenizer: the models' tokenizer.
        limit: the most questions of a task.
        seed: seed of the choice of questions.
        quiet: show no progress line.

    Returns:
        ``{model: {task: TaskScore}}``.

    Raises:
        FactorMixError: as `last_words_for` and `answer_tasks`.
    """
    everyone = {**models} if base is None else {**models, _BASE: base}
    answers: dict[str, tuple[str, float, dict[str, Tensor]]] = {}  # by task: kind, chance, right answers by model
    for stem, text_passages in passages.items():
        answers[f"last-word {stem}"] = ("last-word", 0.0, last_words_for(everyone, text_passages, quiet))
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
