"""Measure multiple-choice accuracy with lm-eval (extra ``factormix[tasks]``), question by question.

    answers = answer_tasks({"model": model}, tokenizer, ["reviews", "my.jsonl", "hellaswag"], limit=200)
    answers["model"]["reviews"].right          # (n,) 1 where the model was right

A task is the name of a file in choice_tasks/, a .jsonl file of questions with "choices", or the name of one of the
tasks of lm-eval. Only the last kind needs the hub. The answer is the choice with the highest log-likelihood per
character (lm-eval's acc_norm) if the task has that metric, else the choice with the highest log-likelihood.

A task file has lm-eval's own keys, and four keys from which FactorMix makes the questions:

    data        text files or assets
    questions   labels (the default) asks for the class; next-sentence asks which sentence comes next
    names       how a label is written as a choice
    offered     number of choices of a question; by default all classes
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
    "reviews",
    "foods",
    "pubmed-sections",
    "newsgroups",
    "reuters",
    "brown-next",
    "pubmed-next",
    "social-iqa",
    "fever",
    "wikihow-goal",
    "wikihow-step",
    "mmlu-dev",
)
LIMIT = 500  # questions of a task by default
BATCH = 8  # requests in one forward
_FOLDER = resources.files("factormix.evaluate") / "choice_tasks"
_OURS = ("data", "questions", "names", "offered")
_METRICS = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]


@dataclass(frozen=True)
class Answers:
    """A model's answers to one task.

    Attributes:
        right: (n,) float32, 1 where the model was right, else 0.
        chance: accuracy of guessing, 0 to 1. It is the mean of 1 / choices, or the accuracy of always giving the same
            answer if that is higher.
    """

    right: Tensor
    chance: float


def check_harness() -> None:
    """Check that lm-eval is installed, so that a run fails before hours of compute and not after.

    Raises:
        FactorMixError: it is not installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise FactorMixError(
            "multiple choice needs lm-eval, which is not installed. Run pip install 'factormix[tasks]', or use --suite "
            "text, which has no tasks."
        ) from error


def local_tasks() -> list[str]:
    """Names of the tasks that need no hub."""
    return sorted(Path(file.name).stem for file in _FOLDER.iterdir() if file.name.endswith(".yaml"))


def read_task(name: str, limit: int = LIMIT, seed: int = 0, quiet: bool = True) -> dict[str, Any] | None:
    """The lm-eval configuration of a local task or of a .jsonl file, with its questions. None for any other name.

    Args:
        name: a task, as the module's text describes.
        limit: the most questions.
        seed: seed of the choice of questions.
        quiet: show no progress line.

    Raises:
        FactorMixError: the task's data cannot be fetched or read.
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
    """Ask every model the questions of every task.

    Args:
        models: causal language models by name.
        tokenizer: the tokenizer of all of them.
        tasks: tasks, as the module's text describes.
        limit: the most questions of a task.
        seed: seed of the choice of questions.
        quiet: show no progress line.

    Returns:
        ``{model: {task: Answers}}``.

    Raises:
        FactorMixError: lm-eval is not installed, it does not know a task or cannot fetch its data, or a task has no
            right and wrong answers.
    """
    check_harness()
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    configs = {name: read_task(name, limit, seed, quiet) for name in tasks}
    wanted: list[str | dict[str, Any]] = [name if config is None else config for name, config in configs.items()]
    named = {name: name if config is None else str(config["task"]) for name, config in configs.items()}
    manager = TaskManager(include_defaults=any(config is None for config in configs.values()))
    _check_known(manager, [name for name, config in configs.items() if config is None])
    found: dict[str, dict[str, Answers]] = {}
    for who, model in models.items():
        say(f"asking {who} {len(tasks)} tasks", quiet)
        harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=BATCH)
        try:
            with redirect_stderr(io.StringIO()) if quiet else nullcontext():  # lm-eval's own progress lines
                result = simple_evaluate(
                    harness, tasks=wanted, task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=True
                )
        except (ConnectionError, OSError) as error:  # the task needs the hub, which cannot be reached
            raise FactorMixError(
                f"lm-eval could not fetch the data of {', '.join(n for n, c in configs.items() if c is None)}: "
                f"{str(error).splitlines()[0]}. Use tasks that need no hub: {', '.join(local_tasks())}."
            ) from error
        found[who] = {name: _answers(name, result, task) for name, task in named.items()}
    return found


def _check_known(manager: Any, names: Sequence[str]) -> None:
    for name in names:
        if name not in manager.all_tasks:
            raise FactorMixError(
                f"unknown task {name!r}; allowed: {', '.join(local_tasks())}, a .jsonl file of questions, or one of "
                "lm-eval's tasks (`lm-eval ls tasks`)."
            )


def _answers(name: str, result: Mapping[str, Any], task: str) -> Answers:
    """The answers to one task, or to all tasks of a group together."""
    samples = [sample for leaf in _leaves(result, task) for sample in result["samples"][leaf]]
    if not samples or not {"acc", "acc_norm"} & samples[0].keys():
        raise FactorMixError(f"task {name!r} has no right and wrong answers; for a text's perplexity use --text FILE.")
    right = [sample.get("acc_norm", sample.get("acc")) for sample in samples]
    guessing = sum(1 / len(sample["resps"]) for sample in samples) / len(samples)
    return Answers(torch.tensor(right, dtype=torch.float32), max(guessing, _one_answer(samples)))


def _one_answer(samples: Sequence[Mapping[str, Any]]) -> float:
    """Accuracy of always giving the answer that is right most often, such as "true" if most claims are true."""
    numbers = [sample["target"] for sample in samples]
    if not all(isinstance(number, int) for number in numbers):
        return 0.0
    texts = Counter(sample["arguments"][number][-1] for sample, number in zip(samples, numbers))
    return texts.most_common(1)[0][1] / len(samples)


def _leaves(result: Mapping[str, Any], task: str) -> list[str]:
    """The tasks of a group, groups within it included; a task that is no group gives itself."""
    inner = (result.get("group_subtasks") or {}).get(task) or []
    return [leaf for subtask in inner for leaf in _leaves(result, subtask)] if inner else [task]


def _questions(config: Mapping[str, Any], limit: int, seed: int, quiet: bool) -> list[Question]:
    from factormix.assets.fetch import fetch_named  # imported here because only tasks need the assets

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
