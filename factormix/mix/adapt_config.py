"""AdaptConfig: all options of stage 2. They are the same in Python, in a YAML recipe and as flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from factormix.data.fewshot import BINS
from factormix.data.labelled import KINDS
from factormix.nn.domain_gate import Kind
from factormix.run.config import Config, option
from factormix.run.errors import FactorMixError

TASK_ADAPTERS = ("pfeiffer", "houlsby", "lora", "prefix", "none")
LANGUAGE_KINDS = ("causal-lm", "text")  # tasks for the model's own language-modelling head


@dataclass(frozen=True)
class AdaptConfig(Config):
    """Options of stage 2 of MixDA (arXiv 2306.05406): gates, a task adapter and a head learn a task.

    The backbone and the domain adapters stay frozen. Where the paper has a default (section 4.1) it is used, with two
    exceptions. The head starts at a probe, where the paper's starts at random. The learning rate is higher, because at
    the paper's largest, 5e-4, a hundred few-shot steps leave the head at chance (docs/results.md).

    Raises:
        FactorMixError: a value is out of range, or two options contradict each other.
    """

    task_adapter: str | None = option(
        None,
        help="kind of task adapter: pfeiffer (the default for labelled text), houlsby, lora, prefix or none; plain "
        "text allows none only",
        choices=TASK_ADAPTERS,
    )
    reduction: float = option(16, help="width of a pfeiffer or houlsby adapter: hidden size / reduction", minimum=1)
    lora_rank: int = option(8, help="rank of a lora adapter", minimum=1)
    prefix_tokens: int = option(30, help="virtual tokens of a prefix adapter", minimum=1)
    gate_kind: str = option(
        "sigmoid",
        help="how the gate weighs the domains: sigmoid weighs each by itself, softmax weighs them and the FFN against "
        "each other, paper is the released MLP",
        choices=get_args(Kind),
    )
    gate_start: str = option(
        "on",
        help="initial weights of the domains: on is full weight, off is nearly 0 (the base), own takes the gate that "
        "`inject` fitted for each adapter",
        choices=("on", "off", "own"),
    )
    head_start: str = option(
        "probe",
        help="initial weights of the head: probe fits them to the model's states before training, random draws them",
        choices=("probe", "random"),
    )
    task_kind: str = option(
        "auto", help="kind of the task; needed only if the file does not show it", choices=("auto", *KINDS)
    )
    pooling: str = option(
        "auto",
        help="state that the head reads: the last token's (the default for decoders), the mean of all (the default "
        "for encoders) or the first token's",
        choices=("auto", "last", "mean", "first"),
    )
    shots: int | None = option(
        None,
        help="few-shot: train on so many examples per class, and choose the best checkpoint on as many others",
        minimum=1,
    )
    bins: int = option(
        BINS, help="few-shot regression: number of ranges of the target, each of which counts as a class", minimum=1
    )
    epochs: int = option(20, help="passes over the training examples", minimum=1)
    batch_size: int = option(8, help="examples in one optimiser step", minimum=1)
    tokens: int = option(
        100_000, help="plain text: tokens to train on; a tenth as many of the development text are scored", minimum=1
    )
    window: int = option(
        256, help="the most tokens of an example, which is cut there; for plain text, tokens of a window", minimum=8
    )
    lr: float = option(3e-3, help="peak learning rate", minimum=0)
    gate_lr: float = option(0.03, help="peak learning rate of the gates", minimum=0)
    warmup: float = option(0.1, help="fraction of the steps in which the learning rate rises", minimum=0, maximum=1)
    clip: float = option(1.0, help="gradient norm above which gradients are scaled down", minimum=0)
    weight_decay: float = option(0.05, help="AdamW's weight decay", minimum=0)
    max_minutes: float = option(
        0.0, help="training stops after so many minutes, and the result is saved; 0 means no limit", minimum=0
    )
    save_steps: int = option(20, help="steps between two checkpoints, from which a killed run can continue", minimum=1)
    seed: int = option(0, help="seed of the initial weights, the shots and the order of the examples")

    def validate(self) -> None:
        """Check ranges and choices, and refuse options that contradict each other."""
        super().validate()
        if self.gate_start == "own" and self.gate_kind != "sigmoid":
            raise FactorMixError(f"gate_start 'own' goes with gate_kind 'sigmoid', not {self.gate_kind!r}.")

    def adapter_for(self, kind: str) -> str:
        """The kind of task adapter for a kind of task."""
        return self.task_adapter or ("none" if kind == "text" else "pfeiffer")
