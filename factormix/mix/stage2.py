"""Stage 2 of MixDA, top to bottom: a base, domain adapters and a task in, a model that mixes the domains out.

shots -> task -> gates, task adapter and head above frozen domains -> one loop over the task's loss -> the checkpoint
that was best on the development set
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

TEXT_EVALUATIONS = 10  # of plain text, in one run; labelled text and prompts are scored after every epoch
DEV_SHARE = 0.1  # of plain text's tokens, scored each time


def choose_examples(
    train_set: Labelled | Documents, dev: Labelled | Documents | None, config: AdaptConfig
) -> tuple[Labelled | Documents, Labelled | Documents]:
    """The training and development sets of a run: K-shot samples where shots are asked for.

    Raises:
        FactorMixError: as `few_shot`; no development set and no shots; sets of two kinds.
    """
    if isinstance(train_set, Documents) or isinstance(dev, Documents):
        if config.shots is not None:
            raise FactorMixError(f"shots {config.shots} needs labelled text; {train_set.name} has no labels.")
        if dev is None:
            raise FactorMixError("no development set: give --dev FILE, of the same kind as the task.")
        if not (isinstance(train_set, Documents) and isinstance(dev, Documents)) or train_set.kind != dev.kind:
            raise FactorMixError(f"{train_set.name} is {train_set.kind} and {dev.name} is {dev.kind}; give one kind.")
        return train_set, dev
    if dev is not None and dev.kind != train_set.kind:
        raise FactorMixError(f"{train_set.name} is {train_set.kind} and {dev.name} is {dev.kind}; give one kind.")
    if config.shots is not None:
        return few_shot(train_set, config.shots, config.seed, dev, config.bins)
    if dev is None:
        raise FactorMixError("no development set: give --dev FILE, or --shots K to draw one from the task.")
    return train_set, dev


def task_of(model: PreTrainedModel, train_set: Labelled | Documents, config: AdaptConfig) -> Task:
    """What is to be learned, by a model that can.

    Raises:
        FactorMixError: as `Task.of`; plain text or prompts for a model without a language-modelling head.
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
        domains: adapter directories by name, in the order of the gates' weights; none for a baseline without domains.
        train_set: labelled text, prompts with targets, or plain text (which trains the gates alone).
        dev: of the same kind; None draws it from `train_set`, which needs ``config.shots``.
        config: the recipe.
        tokenizer: the model's.
        work: checkpoints go there, and a killed run goes on from the last one.
        quiet: no progress bar.

    Returns:
        The model as it was best on the development set, in eval mode and nothing trainable; the task; and seconds,
        tokens, peak_bytes, params_trained, metrics ("dev" of the best step, "best_step", "history", ...).

    Raises:
        FactorMixError: examples, a task adapter or a model that do not go together; NaN in the loss.
    """
    train_set, dev = choose_examples(train_set, dev, config)
    task = task_of(model, train_set, config)
    spec = TaskAdapterSpec.of_config(config, task.kind)
    torch.manual_seed(config.seed)  # the start of task adapter and head
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
        "dev": dev_metrics, "best_step": best.step, "examples": {"train": len(train_set), "dev": len(dev)},
        "parameters": count_trained(mix), **result.metrics,
    }  # fmt: skip
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
    """Batches to train on, and how to score the development set."""
    pad = tokenizer.pad_token_id or 0  # what is there is masked
    if isinstance(train_set, Labelled) and isinstance(dev, Labelled):
        task.check_labels(dev)
        held = encode(dev, tokenizer, task)
        right = dev.labels or []
        encoded = encode(train_set, tokenizer, task)
        batches = LabelledBatches(encoded, task, pad, config.batch_size, config.epochs, config.seed)
        return batches, lambda: score_examples(mix, held, right, task, pad, config.batch_size)
    assert isinstance(train_set, Documents) and isinstance(dev, Documents)
    epochs = config.epochs if task.kind == "causal-lm" else 1
    some = max(task.window, int(DEV_SHARE * config.tokens))
    language = LanguageBatches(train_set, tokenizer, task.window, config.tokens, epochs, config.seed)
    held_out = LanguageBatches(dev, tokenizer, task.window, some, 1, config.seed)
    return language, lambda: score_language(mix, held_out, loss)


def _loop(task: Task, batches: LabelledBatches | LanguageBatches, config: AdaptConfig) -> LoopConfig:
    """Numbers of the loop, which counts tokens: one micro-batch a step, but of plain text `batch_size` windows."""
    one = batches.tokens
    if task.kind == "text":
        batch_tokens = min(config.batch_size * one, config.tokens // one * one or one)
        tokens = max(config.tokens, batch_tokens)
    else:
        batch_tokens, tokens = one, len(batches) * one
    return LoopConfig.of(config, tokens=tokens, batch_tokens=batch_tokens)


class _Best:
    """The best checkpoint so far, in memory and in the work directory, so that a kill does not lose it."""

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
        """Score before the first step; a run that goes on has its best already."""
        if self.metrics is None:
            self._consider(0)

    def after_step(self, step: int) -> None:
        """Score, at the end of an epoch and of the run."""
        if step % self.every and step != self.last:
            return
        self._consider(step)

    def _consider(self, step: int) -> None:
        device = self.mix.device
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16_pays(device)):  # as the steps were
            metrics = self.score()
        if self.task.better(metrics, self.metrics):
            self.step, self.metrics, self.tensors = step, metrics, self.mix.trained_tensors()
            if self.work is not None and PartialState().is_main_process:
                self.work.save("best", self.tensors, {"step": step, "metrics": metrics})

    def restore(self) -> dict[str, Any]:
        """Put the best checkpoint into the model and score it in the model's dtype."""
        self.mix.fill_trained(self.tensors)
        return self.score()


def count_trained(mix: MixModel) -> dict[str, int]:
    """Trained parameters: "gates", "task_adapter", "head"."""
    counts = {
        "gates": sum(p.numel() for gate in mix.gates.values() for p in gate.parameters()),
        "task_adapter": sum(p.numel() for p in mix.task_adapter.trained()),
    }
    return {**counts, "head": sum(p.numel() for p in mix.head.parameters()) if mix.head is not None else 0}
