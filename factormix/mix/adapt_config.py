"""AdaptConfig: every choice of stage 2, the same in Python, in a YAML recipe and as flags."""

from __future__ import annotations

from dataclasses import dataclass

from factormix.data.fewshot import BINS
from factormix.data.labelled import KINDS
from factormix.run.config import Config, option
from factormix.run.errors import FactorMixError

TASK_ADAPTERS = ("pfeiffer", "houlsby", "lora", "prefix", "none")
LANGUAGE_KINDS = ("causal-lm", "text")  # tasks that the language-modelling head does, without a head of their own


@dataclass(frozen=True)
class AdaptConfig(Config):
    """Stage 2 of MixDA: gates, a task adapter and a head learn a task; backbone and domain adapters stay frozen.

    The defaults are the paper's (section 4.1) where it has one, but for the head's start (at random: `random`) and the
    learning rate: at the largest of its three, 5e-4, a hundred few-shot steps leave a head at chance (docs/results.md).
    """

    task_adapter: str | None = option(
        None,
        help="pfeiffer (the default for labelled text), houlsby, lora or prefix; none (plain text: always)",
        choices=TASK_ADAPTERS,
    )
    reduction: float = option(16, help="pfeiffer and houlsby: hidden size / width", minimum=1)
    lora_rank: int = option(8, help="lora: its rank", minimum=1)
    prefix_tokens: int = option(30, help="prefix: its virtual tokens", minimum=1)
    gate: str = option("sigmoid", help="how domains are weighed", choices=("sigmoid", "softmax", "paper"))
    gate_start: str = option(
        "on",
        help="domains start at full weight, or off: near the base, or each by its own gate, which `inject` fitted",
        choices=("on", "off", "own"),
    )
    head_start: str = option(
        "probe", help="the head starts fitted to the states as they are, or at random", choices=("probe", "random")
    )
    task_kind: str = option("auto", help="what the labels are, if the file does not tell", choices=("auto", *KINDS))
    pooling: str = option(
        "auto",
        help="token that the head reads: last (auto for decoders), mean (auto for encoders) or first",
        choices=("auto", "last", "mean", "first"),
    )
    shots: int | None = option(None, help="train on so many examples a class, and choose on as many others", minimum=1)
    bins: int = option(BINS, help="few-shot regression: ranges of the target, each counts as a class", minimum=1)
    epochs: int = option(20, help="passes over the training examples", minimum=1)
    batch_size: int = option(8, help="examples of one optimiser step", minimum=1)
    tokens: int = option(100_000, help="plain text: tokens to train on; of the development text a tenth", minimum=1)
    window: int = option(
        256, help="tokens of an example, longer ones are cut; of plain text, tokens of a window", minimum=8
    )
    lr: float = option(3e-3, help="peak learning rate", minimum=0)
    gate_lr: float = option(0.03, help="peak learning rate of the gates", minimum=0)
    warmup: float = option(0.1, help="fraction of the steps in which the learning rate rises", minimum=0, maximum=1)
    clip: float = option(1.0, help="gradient norm above which gradients are scaled down", minimum=0)
    weight_decay: float = option(0.05, help="AdamW's weight decay", minimum=0)
    max_minutes: float = option(0.0, help="stop in good order after this long; 0 for never", minimum=0)
    save_steps: int = option(20, help="steps between checkpoints a killed run resumes from", minimum=1)
    seed: int = option(0, help="of the start, the shots and the order of the examples")

    def validate(self) -> None:
        """Ranges, choices, and settings that contradict each other."""
        super().validate()
        if self.gate_start == "own" and self.gate != "sigmoid":
            raise FactorMixError(f"gate_start 'own' goes with gate 'sigmoid', not {self.gate!r}.")

    def adapter_for(self, kind: str) -> str:
        """The task adapter for a task of this kind."""
        return self.task_adapter or ("none" if kind == "text" else "pfeiffer")
