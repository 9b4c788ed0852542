"""THE training loop. Healing runs on it, and whatever else trains a model end to end.

transformers' Trainer does the work: accumulation, clipping after backward, warm-up and cosine, mixed precision,
`accelerate launch` over several processes, checkpoints. What comes from outside is a loss and the set of parameters
that train; everything else is frozen meanwhile and as it was afterwards.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from factormix.data.packing import Packed
from factormix.run.config import Config, describe
from factormix.run.errors import FactorMixError
from factormix.run.record import peak_memory_bytes

Loss = Callable[[nn.Module, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""(model, micro-batch) -> named parts, already weighted; their sum is minimised."""


class Batches(Protocol):
    """What a run trains on: micro-batches by number, each a mapping of tensors that the loss understands."""

    tokens: int
    """of one micro-batch; what the run's tokens are counted in"""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class LoopConfig:
    """Numbers of one training run.

    Attributes:
        tokens: in all, over all processes.
        batch_tokens: of one optimiser step, over all processes, rounded to whole windows.
        warmup: fraction of the steps with rising learning rate; a cosine to zero follows.
        clip: gradient norm above which gradients are scaled down, 0 for never.
        save_steps: steps between checkpoints.
        bf16: autocast to bfloat16; None where the device computes it natively.
        max_minutes: stop in good order after this long; 0 for never.
    """

    tokens: int
    batch_tokens: int = 2048
    warmup: float = 0.1
    clip: float = 1.0
    weight_decay: float = 0.0
    save_steps: int = 10
    seed: int = 0
    bf16: bool | None = None
    max_minutes: float = 0.0

    @classmethod
    def of(cls, options: Config, **numbers: Any) -> LoopConfig:
        """The fields that `options`, the config of a training command, has under these names; `numbers` win."""
        own = {field.name for field in fields(cls)} & {option.name for option in describe(type(options))}
        return cls(**{**{name: getattr(options, name) for name in own}, **numbers})


@dataclass
class TrainResult:
    """What a run did, as the JSON of training commands has it."""

    seconds: float
    tokens: int
    peak_bytes: int
    params_trained: int
    metrics: dict[str, Any] = field(default_factory=dict)


class Windows:
    """Packed text as micro-batches of one window: "input_ids" (1, L) and "scored" (1, L)."""

    def __init__(self, packed: Packed) -> None:
        self.packed = packed
        self.tokens = packed.input_ids.shape[1]

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = slice(index, index + 1)
        return {"input_ids": self.packed.input_ids[row], "scored": self.packed.scored[row]}


class _Dataset(Dataset):  # type: ignore[type-arg]
    """`Batches` for a DataLoader."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.batches[index]


class _LossTrainer(Trainer):
    """Trainer with our loss, and the sums of its parts since the last log."""

    loss_is_scaled_for_ga = False  # ours is a mean over the micro-batch; Trainer divides by the accumulation

    def __init__(self, *args: Any, loss: Loss, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss = loss
        self.parts: dict[str, list[float]] = {}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        parts = self.loss(model, inputs)
        total = torch.stack([part.float() for part in parts.values()]).sum()
        if not bool(torch.isfinite(total)):
            values = ", ".join(f"{name} {float(part.detach()):g}" for name, part in parts.items())
            raise FactorMixError(
                f"the loss became {float(total.detach())} at step {self.state.global_step} ({values}); the last "
                "checkpoint is kept. Lower the learning rate and run again with --overwrite."
            )
        for name, part in parts.items():
            self.parts.setdefault(name, []).append(float(part.detach()))
        return total


class _Progress(TrainerCallback):
    """A bar on stderr, the loss by step, and the time limit."""

    def __init__(self, label: str, quiet: bool, max_minutes: float, after_step: Callable[[int], None] | None) -> None:
        self.label, self.quiet, self.after_step = label, quiet, after_step
        self.deadline = time.monotonic() + 60 * max_minutes if max_minutes else math.inf
        self.history: list[dict[str, float]] = []
        self.trainer: _LossTrainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.label, disable=self.quiet)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        means = {name: sum(values) / len(values) for name, values in self.trainer.parts.items()}
        self.trainer.parts = {}
        self.history.append({"step": state.global_step, **means})
        self.bar.update(1)
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in means.items()})
        if self.after_step is not None:
            self.after_step(state.global_step)
        if time.monotonic() > self.deadline:
            control.should_training_stop = control.should_save = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def train(
    model: nn.Module,
    text: Packed | Batches,
    loss: Loss,
    learning_rates: Mapping[str, float],
    config: LoopConfig,
    folder: str | Path,
    *,
    label: str = "training",
    quiet: bool = False,
    after_step: Callable[[int], None] | None = None,
) -> TrainResult:
    """Train some parameters of a model on text; resumes from the last whole checkpoint in `folder`.

    Args:
        model: transformers', PEFT's or any other; left in eval mode, with every requires_grad as it was. Of a PeftModel
            the checkpoints hold the adapters, of another module its state_dict.
        text: windows, or micro-batches made elsewhere; shuffled by the seed and repeated if there are too few.
        loss: see `Loss`.
        learning_rates: peak rate of each parameter that trains, by its name in the model; all others are frozen.
        config: numbers.
        folder: for checkpoints.
        label: of the progress bar.
        quiet: no bar.
        after_step: called with the number of each optimiser step, before its checkpoint is written.

    Raises:
        FactorMixError: nothing to train, too few tokens for one step, NaN in the loss (the last checkpoint stays).
    """
    batches: Batches = Windows(text) if isinstance(text, Packed) else text
    window = batches.tokens
    world = PartialState().num_processes
    step = step_tokens(config.batch_tokens, window, world)
    accumulation, steps = step // (window * world), config.tokens // step
    if steps < 1:
        raise FactorMixError(
            f"{config.tokens} training tokens are less than one step of {step} "
            f"({accumulation} windows of {window} on {world} process(es)); ask for more tokens or smaller batch_tokens."
        )
    device = next(model.parameters()).device
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation, max_grad_norm=config.clip, lr_scheduler_type="cosine",
        warmup_steps=min(math.ceil(config.warmup * steps), steps - 1), save_steps=config.save_steps, save_total_limit=2,
        seed=config.seed, data_seed=config.seed, bf16=bf16_pays(device) if config.bf16 is None else config.bf16,
        use_cpu=device.type == "cpu", report_to="none", logging_strategy="no", disable_tqdm=True,
        remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    forward_before = {k: v for k, v in model.__dict__.items() if k == "forward"}  # of a device map's hooks
    was_trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    groups = _freeze_others(model, learning_rates, config.weight_decay)
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    callback = _Progress(label, quiet or not PartialState().is_main_process, config.max_minutes, after_step)
    trainer = _LossTrainer(
        model, arguments, train_dataset=_Dataset(batches), data_collator=_the_one, loss=loss,
        optimizers=(optimiser, None), callbacks=[callback],
    )  # fmt: skip
    callback.trainer = trainer
    for unwanted in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(unwanted)
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    finally:
        model.__dict__.pop("forward", None)  # accelerate's: the former one in autocast, and it would stay
        model.__dict__.update(forward_before)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(was_trainable[name])
            parameter.grad = None
        model.eval()
    return TrainResult(
        seconds=time.perf_counter() - started,
        tokens=trainer.state.global_step * accumulation * window * world,
        peak_bytes=peak_memory_bytes(device.type),
        params_trained=sum(p.numel() for group in groups for p in group["params"]),
        metrics={"steps": trainer.state.global_step, "history": callback.history},
    )


def step_tokens(batch_tokens: int, window: int, world: int = 1) -> int:
    """Tokens of an optimiser step of about `batch_tokens`: whole windows on each of `world` processes, one or more."""
    return max(1, round(batch_tokens / (window * world))) * window * world


def _the_one(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The collator: an item is a micro-batch already."""
    assert len(items) == 1  # per_device_train_batch_size
    return items[0]


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint that is whole: Trainer writes trainer_state.json last, so a killed save lacks it."""
    found = sorted(Path(folder).glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True)
    for checkpoint in found:
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(checkpoint)
    return None


def _freeze_others(model: nn.Module, learning_rates: Mapping[str, float], decay: float) -> list[dict[str, Any]]:
    """Freeze all but the named parameters; optimiser groups by learning rate, no weight decay on vectors."""
    named = dict(model.named_parameters())
    unknown = sorted(set(learning_rates) - set(named))
    if unknown or not learning_rates:
        raise FactorMixError(f"nothing to train: {unknown[:3] or 'no parameter'} named, {len(named)} in the model.")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        parameter.requires_grad_(name in learning_rates)
        if name in learning_rates:
            key = (learning_rates[name], decay if parameter.dim() > 1 else 0.0)
            groups.setdefault(key, []).append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": wd} for (lr, wd), params in groups.items()]


def bf16_pays(device: torch.device) -> bool:
    """True where bfloat16 products are native: GPUs that have them, CPUs with AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
