"""Multiple-choice accuracy through lm-eval (extra ``factormix[tasks]``), question by question.

    answers = answer_tasks({"model": model}, tokenizer, ["reviews", "my.jsonl", "hellaswag"], limit=200)
    answers["model"]["reviews"].right          # (n,) 1 where the model was right

A task is a file of choice_tasks/ (they need no hub), a .jsonl file of questions with "choices", or one of lm-eval's own
by its name, which fetches its data from the hub. An answer is the choice with the highest log-likelihood a character
(lm-eval's acc_norm) where the task has that, else the highest log-likelihood.

A task file holds lm-eval's own keys and, beside them, what FactorMix makes the questions from:

    data        text files or assets
    questions   labels (default): which class; next-sentence: which sentence comes next
    names       how a label is written as a choice
    offered     choices of a question; by default all classes
"""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from factormix.data.labelled import Labelled, read_labelled
from factormix.data.questions import Question, from_labels, next_sentences
from factormix.data.text import read_documents
from factormix.run.errors import FactorMixError
from factormix.run.progress import say

CORE_TASKS = (
    "reviews", "foods", "pubmed-sections", "newsgroups", "reuters", "brown-next", "pubmed-next", "social-iqa", "fever",
    "wikihow-goal", "wikihow-step", "mmlu-dev",
)  # fmt: skip
LIMIT = 500  # questions of a task, unless another limit is given
BATCH = 8  # requests a forward
_FOLDER = resources.files("factormix.evaluate") / "choice_tasks"
_OURS = ("data", "questions", "names", "offered")
_METRICS = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]


@dataclass(frozen=True)
class Answers:
    """A model's answers to one task.

    Attributes:
        right: (n,) float, 1 where it was right.
        chance: accuracy without looking: the mean of 1 / choices, or that of one answer given always if it is higher.
    """

    right: Tensor
    chance: float


def check_harness() -> None:
    """Raise FactorMixError where lm-eval is not installed: before hours of compute, not after."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise FactorMixError(
            "multiple choice needs lm-eval, which is not installed: pip install 'factormix[tasks]'; or --suite text, "
            "which has no tasks."
        ) from error


def local_tasks() -> list[str]:
    """Names of the tasks that need no hub."""
    return sorted(Path(file.name).stem for file in _FOLDER.iterdir() if file.name.endswith(".yaml"))


def read_task(name: str, limit: int = LIMIT, seed: int = 0, quiet: bool = True) -> dict[str, Any] | None:
    """The lm-eval configuration of a local task or of a .jsonl file, its questions inside; None for any other name.

    Raises:
        FactorMixError: data that cannot be had or read.
    """
    if name.endswith(".jsonl"):
        config = {"task": Path(name).stem, "doc_to_text": "{{text}}"}
        questions = from_labels(read_labelled(name, kind="multiple-choice"), count=limit, seed=seed)
    elif name in local_tasks():
        config = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
        questions = _questions(config, limit, seed, quiet)
    else:
        return None
    return {
        "output_type": "multiple_choice",
        "custom_dataset": lambda **_: _dataset(questions),
        "test_split": "test",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": _METRICS,
        **{key: value for key, value in config.items() if key not in _OURS},
    }


def answer_tasks(
    models: Mapping[str, nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int = LIMIT,
    seed: int = 0,
    quiet: bool = True,
) -> dict[str, dict[str, Answers]]:
    """Ask every model every task: ``{model: {task: Answers}}``.

    Args:
        models: causal language models by name.
        tokenizer: theirs.
        tasks: see the module's text.
        limit: questions of a task, at most.
        seed: of which questions are asked.
        quiet: say nothing.

    Raises:
        FactorMixError: lm-eval is missing, or does not know or cannot have a task, or a task without right and wrong.
    """
    check_harness()
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    made = {name: read_task(name, limit, seed, quiet) for name in tasks}
    wanted: list[str | dict[str, Any]] = [name if config is None else config for name, config in made.items()]
    named = {name: name if config is None else str(config["task"]) for name, config in made.items()}
    manager = TaskManager(include_defaults=any(config is None for config in made.values()))
    _check_known(manager, [name for name, config in made.items() if config is None])
    found: dict[str, dict[str, Answers]] = {}
    for who, model in models.items():
        say(f"asking {who} {len(tasks)} tasks", quiet)
        harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=BATCH)
        try:
            with redirect_stderr(io.StringIO()) if quiet else nullcontext():  # lm-eval's own progress lines
                result = simple_evaluate(
                    harness, tasks=wanted, task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=True
                )
        except (ConnectionError, OSError) as error:  # a task of the hub, and no hub
            raise FactorMixError(
                f"lm-eval could not have the data of {', '.join(n for n, c in made.items() if c is None)}: "
                f"{str(error).splitlines()[0]}. Use tasks that need no hub: {', '.join(local_tasks())}."
            ) from error
        found[who] = {name: _answers(name, result, task) for name, task in named.items()}
    return found


def _check_known(manager: Any, names: Sequence[str]) -> None:
    for name in names:
        if name not in manager.all_tasks:
            raise FactorMixError(
                f"unknown task {name!r}; allowed: {', '.join(local_tasks())}, a .jsonl file of questions, or a task of "
                "lm-eval's (`lm-eval ls tasks`)."
            )


def _answers(name: str, result: Mapping[str, Any], task: str) -> Answers:
    """Of one task, or of a group's tasks together."""
    samples = [each for leaf in _leaves(result, task) for each in result["samples"][leaf]]
    if not samples or not {"acc", "acc_norm"} & samples[0].keys():
        raise FactorMixError(f"task {name!r} has no right and wrong answers; for a text's perplexity use --text FILE.")
    right = [each.get("acc_norm", each.get("acc")) for each in samples]
    guessing = sum(1 / len(each["resps"]) for each in samples) / len(samples)
    return Answers(torch.tensor(right, dtype=torch.float32), max(guessing, _one_answer(samples)))


def _one_answer(samples: Sequence[Mapping[str, Any]]) -> float:
    """Accuracy of always giving the answer that is right most often ("true", of claims that are mostly true)."""
    numbers = [each["target"] for each in samples]
    if not all(isinstance(number, int) for number in numbers):
        return 0.0
    texts = Counter(each["arguments"][number][-1] for each, number in zip(samples, numbers))
    return texts.most_common(1)[0][1] / len(samples)


def _leaves(result: Mapping[str, Any], task: str) -> list[str]:
    inner = (result.get("group_subtasks") or {}).get(task) or []
    return [leaf for each in inner for leaf in _leaves(result, each)] if inner else [task]


def _questions(config: Mapping[str, Any], limit: int, seed: int, quiet: bool) -> list[Question]:
    from factormix.assets.fetch import fetch_named  # only where tasks are asked

    files = [fetch_named(name, quiet) for name in config["data"]]
    if config.get("questions") == "next-sentence":
        return next_sentences(read_documents([str(file) for file in files]).texts, limit, seed)
    return from_labels(_joined(files), config.get("names"), config.get("offered"), limit, seed)


def _joined(files: Sequence[Path]) -> Labelled:
    parts = [read_labelled(file) for file in files]
    return replace(
        parts[0],
        texts=[text for part in parts for text in part.texts],
        labels=[label for part in parts for label in part.labels or ()],
        records=[record for part in parts for record in part.records],
    )


def _dataset(questions: list[Question]) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(questions)}
