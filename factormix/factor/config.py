"""FactorConfig: every choice of a factorisation, the same in Python, in a YAML recipe and as flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from factormix.factor.partition import PARTITIONS, ROUTED, STATIC
from factormix.nn import Layout
from factormix.run.config import Config, option
from factormix.run.errors import FactorMixError, choose


@dataclass(frozen=True)
class HealConfig(Config):
    """Healing: end-to-end distillation of the sparse model from the dense one.

    loss = kl * KL(dense || sparse logits) + ce * CE + pa * PA + balance * load balance
    """

    tokens: int = option(0, help="training tokens; 0 leaves the model unhealed", minimum=0)
    kl: float = option(
        1.0,
        help="weight of the logits' KL from the dense teacher; without logits, of the states' distance",
        minimum=0,
    )
    ce: float = option(0.0, help="weight of the next-token cross-entropy", minimum=0)
    pa: float = option(0.0, help="weight of the PA loss on the routers (needs the dense FFN at every site)", minimum=0)
    balance: float = option(0.0, help="weight of the load balance across tokens", minimum=0)
    lr: float | None = option(
        None,
        help="peak learning rate of experts and shared neurons; left open 0.002 of each tensor's RMS, and less where "
        "more than half runs",
        minimum=0,
    )
    router_lr: float | None = option(
        None,
        help="peak learning rate of routers; left open 1e-4 of each one's RMS, and less where more than half runs",
        minimum=0,
    )
    batch_tokens: int = option(512, help="tokens of one optimiser step, accumulated over windows", minimum=1)
    warmup: float = option(0.1, help="fraction of the steps in which the learning rate rises", minimum=0, maximum=1)
    clip: float = option(1.0, help="gradient norm above which gradients are scaled down, after backward", minimum=0)
    weight_decay: float = option(0.0, help="AdamW's weight decay", minimum=0)
    max_minutes: float = option(0.0, help="stop in good order after this long; 0 for never", minimum=0)
    save_steps: int = option(40, help="steps between checkpoints a killed run resumes from", minimum=1)


@dataclass(frozen=True)
class FactorConfig(Config):
    """How dense FFNs become sparse ones. `FactorConfig.parse("S4A4E16")` takes the measured defaults."""

    layout: str = option(
        "S4A4E16",
        help="S4A4E16: 4 of 16 slices shared, 4 chosen; 1R4E2K: the paper's; S8A0E16: 8 stay, pruned",
    )
    allocation: str = option(
        "global",
        help="global: the layout is the mean, FFNs whose errors cost more keep more slices active; uniform: the layout "
        "in every FFN, as other engines want it",
        choices=("global", "uniform"),
    )
    partition: str = option(
        "coactivation", help="how neurons are grouped; flap and wanda prune", choices=tuple(PARTITIONS)
    )
    label: str = option(
        "joint",
        help="what a router should have chosen: the best subset, the largest contributions, FactorLLM's own, or any",
        choices=("joint", "contribution", "paper", "random"),
    )
    router_loss: str = option(
        "bce",
        help="the router's loss towards the label: per expert, PA over K-hot/K, PA over soft gains, FactorLLM's",
        choices=("bce", "pa", "pa-soft", "paper"),
    )
    router: str = option(
        "linear",
        help="form of the router; mlp (MoEfication) and neuron (CMoE, with that partition) are for comparison",
        choices=("linear", "mlp", "neuron"),
    )
    gate: str = option(
        "hard", help="chosen outputs times 1, E/K, or the score's sigmoid", choices=("hard", "paper", "soft")
    )
    layer_fit: bool = option(True, help="fit each sparse FFN to its dense output, layer by layer")
    fit_passes: float = option(
        5.0, help="layer fit: passes over the calibration text with gradient steps on all weights of the FFN", minimum=0
    )
    fit_lr: float = option(0.0075, help="layer fit: peak rate of those steps, in units of a weight's RMS", minimum=0)
    ridge: float = option(
        1.0, help="layer fit: pull of the closed form's down projection towards its old values", minimum=0
    )
    router_steps: int = option(150, help="steps of 2,048 tokens to fit each router", minimum=1)
    router_lr: float = option(1e-2, help="peak learning rate of the router's fit", minimum=0)
    layers: list[int] | None = option(None, help="factor only these layers; all by default")
    tokens: int = option(16_384, help="calibration tokens", minimum=1)
    window: int = option(512, help="tokens of a calibration window", minimum=8)
    seed: int = option(0, help="of partitions, sampling and training order")
    heal: HealConfig = option(HealConfig, help="end-to-end healing")

    def validate(self) -> None:
        """Ranges, choices, and settings that contradict each other."""
        super().validate()
        layout = Layout.parse(self.layout)
        if self.partition in STATIC and layout.active:
            raise FactorMixError(
                f"partition {self.partition!r} prunes and makes no experts; layout {layout} wants {layout.active}. "
                f"Use S{layout.shared + layout.active}A0E{layout.slices}, or partition 'coactivation'."
            )
        if self.partition in ROUTED and (layout.shared or not layout.active):
            raise FactorMixError(
                f"partition {self.partition!r} knows routed experts only; layout {layout} shares {layout.shared} and "
                f"chooses {layout.active}. Use S0A{layout.shared + layout.active}E{layout.slices}, or the preset."
            )
        if self.router == "neuron" and self.partition != "cmoe":
            raise FactorMixError(
                f"router 'neuron' asks the neuron that stands for each expert, and partition {self.partition!r} names "
                "none. Use partition 'cmoe', or router 'linear'."
            )
        if self.gate == "paper" and layout.shared:
            raise FactorMixError(
                f"gate 'paper' multiplies every output by E/K and knows no shared neurons; layout {layout} shares "
                f"{layout.shared}. Use S0A{layout.active}E{layout.slices}, or gate 'hard'."
            )

    @classmethod
    def parse(cls, layout: str, **options: Any) -> FactorConfig:
        """A layout in either notation with the measured defaults, e.g. ``parse("S4A4E16", seed=1)``."""
        return cls(layout=str(Layout.parse(layout)), **options)

    @classmethod
    def preset(cls, name: str, layout: str | None = None, **options: Any) -> FactorConfig:
        """The recipe of a method, at the active fraction of `layout`: where it knows no shared neurons, S4A4E16 becomes
        S0A8E16, and S8A0E16 where it knows no experts.

        default      chosen by measurement
        paper        FactorLLM as released, its released defects aside, its own healing losses
        moefication  weight clusters and an MLP router (`partition.moefication`, `routers`)
        cmoe         activation rates, clusters of patterns, a router of neurons (`partition.cmoe`)
        flap, wanda  static pruning as published, without a layer fit (`partition.static`)
        """
        choose("preset", name, PRESETS)
        cut = Layout.parse(layout or "S4A4E16")
        running, preset = cut.shared + cut.active, PRESETS[name]
        if preset.experts == "routed":
            cut = Layout(0, running, cut.slices)
        elif preset.experts == "none":
            cut = Layout(running, 0, cut.slices)
        return cls.from_dict({"layout": str(cut), **preset.options, **options})

    @property
    def cut(self) -> Layout:
        """The layout, parsed."""
        return Layout.parse(self.layout)

    @property
    def shares_out(self) -> bool:
        """True where FFNs may come to differ: there is a budget to share out."""
        return self.allocation == "global" and self.cut.active_fraction < 1


@dataclass(frozen=True)
class Preset:
    """What a published method sets of FactorConfig; `experts`: which slices it knows ("shared and routed", "routed",
    "none")."""

    experts: str
    options: dict[str, Any]


_PAPER_HEAL = HealConfig(kl=0.0, ce=1.0, pa=0.05, balance=0.01, lr=4e-5, router_lr=4e-5, weight_decay=1e-5)
_PUBLISHED = {"allocation": "uniform", "layer_fit": False}
_PAPER = {"partition": "contiguous", "label": "paper", "router_loss": "paper", "gate": "paper", "heal": _PAPER_HEAL}

PRESETS: dict[str, Preset] = {
    "default": Preset("shared and routed", {}),
    "paper": Preset("routed", {**_PUBLISHED, **_PAPER}),
    "moefication": Preset("routed", {**_PUBLISHED, "partition": "moefication", "router": "mlp"}),
    "cmoe": Preset("shared and routed", {**_PUBLISHED, "partition": "cmoe", "router": "neuron"}),
    "flap": Preset("none", {**_PUBLISHED, "partition": "flap"}),
    "wanda": Preset("none", {**_PUBLISHED, "partition": "wanda"}),
}
