"""Stage 2 of MixDA (arXiv 2306.05406, section 3.3): learn a task with a model that mixes frozen domain adapters.

shots -> task -> gates, task adapter and head above frozen domains -> one training loop over the task's loss -> the
checkpoint that was best on the development set
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factormix.data.fewshot import few_shot
from factormix.data.labelled import Labelled
from factormix.data.packing import fitting, mask_token
from factormix.data.text import Documents
from factormix.mix.adapt_config import AdaptConfig
from factormix.mix.examples import LabelledBatches, LanguageBatches, encode
from factormix.mix.mix_model import MixModel
from factormix.mix.probe import probe_head
from factormix.mix.score import TaskLoss, score_examples, score_language
from factormix.mix.stage1 import learns_by
from factormix.mix.task import Task
from factormix.mix.task_adapters import TaskAdapterSpec
from factormix.nn import sites_of
from factormix.run.errors import FactorMixError
from factormix.run.workdir import WorkDirectory
from factormix.train import LoopConfig, bf16_pays, train

TEXT_EVALUATIONS = 10  # plain text is scored so often in a run; labelled text and prompts after every epoch
DEV_SHARE = 0.1  # development tokens of plain text scored each time, as a share of the tokens trained on


def choose_examples(
    train_set: Labelled | Documents, dev: Labelled | Documents | None, config: AdaptConfig
) -> tuple[Labelled | Documents, Labelled | Documents]:
    """The training and development sets of a run. With ``config.shots`` they are K-shot samples.

    Raises:
        FactorMixError: `few_shot` refuses, there is neither a development set nor shots, or the sets differ in kind.
    """
    if isinstance(train_set, Documents) or isinstance(dev, Documents):
        if config.shots is not None:
            raise FactorMixError(f"shots {config.shots} needs labelled text; {train_set.name} has no labels.")
        if dev is None:
            raise FactorMixError("no development set received; give --dev FILE of the same kind as the task.")
        if not (isinstance(train_set, Documents) and isinstance(dev, Documents)) or train_set.kind != dev.kind:
            raise FactorMixError(_two_kinds(train_set, dev))
        return train_set, dev
    if dev is not None and dev.kind != train_set.kind:
        raise FactorMixError(_two_kinds(train_set, dev))
    if config.shots is not None:
        return few_shot(train_set, config.shots, config.seed, dev, config.bins)
    if dev is None:
        raise FactorMixError("no development set received; give --dev FILE, or --shots K to draw one from the task.")
    return train_set, dev


def _two_kinds(train_set: Labelled | Documents, dev: Labelled | Documents) -> str:
    return f"{train_set.name} is {train_set.kind} and {dev.name} is {dev.kind}; give two files of one kind."


def task_of(model: PreTrainedModel, train_set: Labelled | Documents, config: AdaptConfig) -> Task:
    """The task of a training set, for a model that can learn it.

    Raises:
        FactorMixError: `Task.of` refuses, or the set is plain text or prompts and the model has no language-modelling
            head.
    """
    window = fitting(config.window, model.config)
    if isinstance(train_set, Documents):
        learns_by(model)
        return Task("causal-lm" if train_set.kind == "knowledge" else "text", window=window)
    pooling = config.pooling
    if pooling == "auto":
        pooling = "last" if sites_of(model)[0].stack == "decoder" else "mean"
    return Task.of(train_set, window, pooling)


def adapt(
    model: PreTrainedModel,
    domains: Mapping[str, str | Path],
    train_set: Labelled | Documents,
    dev: Labelled | Documents | None,
    config: AdaptConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    work: WorkDirectory | None = None,
    quiet: bool = False,
) -> tuple[MixModel, Task, dict[str, Any]]:
    """Learn a task above frozen domain adapters.

    Args:
        model: the base the adapters were made from, dense or FactorMix, changed in place.
        domains: adapter directories by name, in the order of the gates' weights. It is empty for a baseline without
            domains.
        train_set: labelled text, prompts with targets, or plain text, which trains only the gates.
        dev: development set of the same kind. None draws it from `train_set`, which needs ``config.shots``.
        config: the options.
        tokenizer: the model's tokenizer.
        work: directory of the checkpoints, from which a killed run continues.
        quiet: show no progress bar.

    Returns:
        The model at its best step on the development set, in eval mode with nothing trainable; the task; and a dict
        with seconds, tokens, peak_bytes, params_trained, and metrics ("dev" of the best step, "best_step",
        "examples", "parameters", "history").

    Raises:
        FactorMixError: the examples, the task adapter, the domains and the model do not fit together, or the loss is
            NaN.
    """
    train_set, dev = choose_examples(train_set, dev, config)
    task = task_of(model, train_set, config)
    spec = TaskAdapterSpec.of_config(config, task.kind)
    torch.manual_seed(config.seed)  # for the initial weights of task adapter and head
    mix = MixModel(model, domains, spec, task.outputs, task.pooling, config.gate_kind, config.gate_start)
    mask = mask_token(tokenizer, model) if not task.outputs and learns_by(model) == "masked" else None
    loss = TaskLoss(mix, task, mask)
    batches, score = _prepare(mix, task, train_set, dev, config, tokenizer, loss)
    if isinstance(batches, LabelledBatches) and config.head_start == "probe":
        probe_head(mix, batches.examples, task, batches.pad, config.batch_size, config.seed)
    loop = _loop(task, batches, config)
    steps = loop.tokens // loop.batch_tokens
    every = batches.steps_per_epoch if task.kind != "text" else max(1, steps // TEXT_EVALUATIONS)
    best = _Best(mix, task, score, every, steps, work)
    best.at_start()
    mix.set_trainable(True)
    mix.assert_trainable(True, "before training")
    rates = {name: config.gate_lr if ".gate." in name else config.lr for name in mix.trained}
    with tempfile.TemporaryDirectory() as scratch:
        folder = scratch if work is None else work.path / "stage2"
        result = train(
            mix, batches, loss, rates, loop, folder, label="adapting", quiet=quiet, after_step=best.after_step
        )
    mix.assert_trainable(True, "after training")
    mix.set_trainable(False)
    dev_metrics = best.restore()
    done = asdict(result)
    done["metrics"] = {
        "dev": dev_metrics,
        "best_step": best.step,
        "examples": {"train": len(train_set), "dev": len(dev)},
        "parameters": count_trained(mix),
        **result.metrics,
    }
    return mix, task, done


def _prepare(
    mix: MixModel,
    task: Task,
    train_set: Labelled | Documents,
    dev: Labelled | Documents,
    config: AdaptConfig,
    tokenizer: PreTrainedTokenizerBase,
    loss: TaskLoss,
) -> tuple[LabelledBatches | LanguageBatches, Callable[[], dict[str, Any]]]:
    """The batches to train on, and a function that scores the development set."""
    pad = tokenizer.pad_token_id or 0  # padding is masked, so any id will do
    if isinstance(train_set, Labelled) and isinstance(dev, Labelled):
        task.check_labels(dev)
        dev_examples = encode(dev, tokenizer, task)
        right = dev.labels or []
        encoded = encode(train_set, tokenizer, task)
        batches = LabelledBatches(encoded, task, pad, config.batch_size, config.epochs, config.seed)
        return batches, lambda: score_examples(mix, dev_examples, right, task, pad, config.batch_size)
    assert isinstance(train_set, Documents) and isinstance(dev, Documents)
    epochs = config.epochs if task.kind == "causal-lm" else 1
    dev_tokens = max(task.window, int(DEV_SHARE * config.tokens))
    language = LanguageBatches(train_set, tokenizer, task.window, config.tokens, epochs, config.seed)
    dev_batches = LanguageBatches(dev, tokenizer, task.window, dev_tokens, 1, config.seed)
    return language, lambda: score_language(mix, dev_batches, loss)


def _loop(task: Task, batches: LabelledBatches | LanguageBatches, config: AdaptConfig) -> LoopConfig:
    """The numbers of the loop, in tokens. A step is one micro-batch, but for plain text `batch_size` windows."""
    one = batches.tokens
    if task.kind == "text":
        batch_tokens = min(config.batch_size * one, config.tokens // one * one or one)
        tokens = max(config.tokens, batch_tokens)
    else:
        batch_tokens, tokens = one, len(batches) * one
    return LoopConfig.of(config, tokens=tokens, batch_tokens=batch_tokens)


class _Best:
    """The best checkpoint so far. It is also in the work directory, so that a killed run does not lose it."""

    def __init__(
        self,
        mix: MixModel,
        task: Task,
        score: Callable[[], dict[str, Any]],
        every: int,
        last: int,
        work: WorkDirectory | None,
    ) -> None:
        self.mix, self.task, self.score, self.every, self.last, self.work = mix, task, score, every, last, work
        self.metrics: dict[str, Any] | None = None
        self.step = 0
        self.tensors: dict[str, Tensor] = {}
        if work is not None and work.done("best"):
            self.tensors, found = work.load("best")
            self.step, self.metrics = found["step"], found["metrics"]

    def at_start(self) -> None:
        """Score before the first step. A run that continues has a best checkpoint already."""
        if self.metrics is None:
            self._consider(0)

    def after_step(self, step: int) -> None:
        """Score at the end of every epoch and of the run."""
        if step % self.every and step != self.last:
            return
        self._consider(step)

    def _consider(self, step: int) -> None:
        device = self.mix.device
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16_pays(device)):  # as in training
            metrics = self.score()
        if self.task.better(metrics, self.metrics):
            self.step, self.metrics, self.tensors = step, metrics, self.mix.trained_tensors()
            if self.work is not None and PartialState().is_main_process:
                self.work.save("best", self.tensors, {"step": step, "metrics": metrics})

    def restore(self) -> dict[str, Any]:
        """Load the best checkpoint into the model, and score it in the model's dtype."""
        self.mix.fill_trained(self.tensors)
        return self.score()


def count_trained(mix: MixModel) -> dict[str, int]:
    """Number of trained parameters in "gates", "task_adapter" and "head"."""
    counts = {
        "gates": sum(p.numel() for gate in mix.gates.values() for p in gate.parameters()),
        "task_adapter": sum(p.numel() for p in mix.task_adapter.trained()),
    }
    return {**counts, "head": sum(p.numel() for p in mix.head.parameters()) if mix.head is not None else 0}
