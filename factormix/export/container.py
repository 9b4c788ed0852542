"""Container: a stock MoE architecture that a factored model can be written as. containers/ has a file for each.

A container says what it cannot hold (`problems`), how its router scores (`scoring`), its config (`config`) and the
names of a sparse FFN's tensors (`tensors`). All other tensors of a decoder have the same names in these families and
containers.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from factormix.export.needs import Needs
from factormix.export.scoring import Scoring
from factormix.nn import Layout


@dataclass(frozen=True)
class Problem:
    """A need that a container cannot hold.

    Attributes:
        reason: the problem, as a clause whose subject is the container.
        remedy: what the user can do instead, as a sentence.
        fix: how `--approximate` changes the needs; None if it cannot help.
        costs: how the fix changes the model, as a clause.
    """

    reason: str
    remedy: str
    fix: Callable[[Needs], Needs] | None = None
    costs: str = ""


@dataclass(frozen=True)
class Block:
    """A sparse FFN's tensors before a container names them.

    Attributes:
        router: (R, H) float32.
        gate_up: (R, 2W, H), gate rows first.
        down: (R, H, W), already divided by the weight that the container's router gives.
        shared_gate_up: (2S, H), gate rows first; None without shared neurons. S counts shared neurons here.
        shared_down: (H, S); None without shared neurons.
    """

    router: Tensor
    gate_up: Tensor
    down: Tensor
    shared_gate_up: Tensor | None = None
    shared_down: Tensor | None = None


class Container(ABC):
    """A stock architecture. Its class attributes say what it can hold.

    Attributes:
        name: its name for ``--to``.
        config_class, model_class: its classes in transformers.
        about: why `auto` prefers it, as a clause.
        router_name: name of the router's module below a layer. Its forward returns (logits, weights, chosen).
        qk_norms: the kinds of `Backbone.qk_norm` that it can have.
        norm: the `Backbone.norm` that it has.
        biases: pairs (q/k/v, output) of attention biases that it can have.
        qkv_zeros: if True, a model without q, k and v biases is written with zeros there.
        windows: attention windows that it can have: "none", "all" (in every layer or in none) or "layers" (any layers).
        multipliers: whether it has Granite's multipliers.
        shared: whether it can hold shared neurons: "no", "yes" or "always" (it must have some).
        soft: whether it can weigh experts by the sigmoid of their scores.
        flips: share of (token, layer) routing decisions that may differ from FactorMix's in parity, 0 to 1.
        beyond_ties: share of decisions that may differ although the scores were no tie, 0 to 1.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[PretrainedConfig]]
    model_class: ClassVar[type[PreTrainedModel]]
    about: ClassVar[str]
    router_name: ClassVar[str] = "mlp.gate"
    qk_norms: ClassVar[tuple[str, ...]] = ("none",)
    norm: ClassVar[str] = "before"
    biases: ClassVar[tuple[tuple[bool, bool], ...]] = ((False, False),)
    qkv_zeros: ClassVar[bool] = False
    windows: ClassVar[str] = "none"
    multipliers: ClassVar[bool] = False
    shared: ClassVar[str] = "yes"
    soft: ClassVar[bool] = False
    flips: ClassVar[float] = 1e-3
    beyond_ties: ClassVar[float] = 1e-3

    @abstractmethod
    def scoring(self, needs: Needs) -> Scoring:
        """How its router scores, with the settings that these needs require."""

    @abstractmethod
    def own_config(self, needs: Needs) -> dict[str, Any]:
        """Its config fields that are not in `backbone.COMMON`."""

    @abstractmethod
    def tensors(self, block: Block) -> dict[str, Tensor]:
        """One layer's FFN tensors by transformers' names below the layer."""

    @abstractmethod
    def block(self, tensors: Mapping[str, Tensor]) -> Block:
        """The inverse of `tensors`. Padding that the container added stays."""

    def config(self, needs: Needs) -> PretrainedConfig:
        """The config of the exported model."""
        common = copy.deepcopy(dict(needs.backbone.common))
        if needs.cut_context is not None:
            common["max_position_embeddings"] = min(common["max_position_embeddings"], needs.cut_context)
        fields = {**common, "head_dim": needs.backbone.head_dim, **self.own_config(needs)}
        return self.config_class(**fields, architectures=[self.model_class.__name__])

    def problems(self, needs: Needs) -> list[Problem]:
        """Every reason why it cannot hold `needs` exactly; empty if it can."""
        return [*self._backbone_problems(needs), *self._ffn_problems(needs)]

    def _backbone_problems(self, needs: Needs) -> list[Problem]:
        backbone, found = needs.backbone, []
        elsewhere = "Choose another container, or serve it with factormix.load."
        if backbone.norm != self.norm:
            found.append(Problem(f"norms {self.norm} attention and FFN, not {backbone.norm} them", elsewhere))
        if backbone.qk_norm not in self.qk_norms:
            has = " or ".join(self.qk_norms)
            found.append(Problem(f"has query and key norms {has!r}, not {backbone.qk_norm!r}", elsewhere))
        if (backbone.qkv_bias, backbone.out_bias) not in self.biases:
            found.append(Problem("has no place for these attention biases", elsewhere))
        if backbone.has_multipliers and not self.multipliers:
            found.append(Problem("has no embedding, attention, residual and logits multipliers", elsewhere))
        partial = any(backbone.windowed) and not all(backbone.windowed)
        kept = needs.cut_context is None and backbone.window is not None
        if kept and (self.windows == "none" or (self.windows == "all" and partial)):
            window = backbone.window
            found.append(
                Problem(
                    f"attends to all positions, not to a sliding window of {window} in {sum(backbone.windowed)} layers",
                    elsewhere,
                    lambda n: replace(n, cut_context=window),
                    f"the context ends at {window} positions, up to which nothing changes",
                )
            )
        return found

    def _ffn_problems(self, needs: Needs) -> list[Problem]:
        found = []
        layout = needs.layout
        if len({spec.layout.routed for spec in needs.specs}) > 1:
            experts = sorted({spec.layout.routed for spec in needs.specs})
            found.append(
                Problem(f"has one number of experts for all layers, not {experts}", "Factor with --allocation uniform.")
            )
        if needs.uneven:
            active = sorted({spec.active for spec in needs.specs})
            found.append(
                Problem(
                    f"gives every layer the same number of active experts, not {active}",
                    "Factor with --allocation uniform.",
                    lambda n: replace(n, most_active=True),
                    f"every layer runs {needs.active} experts",
                )
            )
        if needs.biased:
            found.append(
                Problem(
                    "has no biases in its experts",
                    "Factor a model without FFN biases, or use factormix.load.",
                    lambda n: replace(n, drop_bias=True),
                    "the FFNs' biases are left out",
                )
            )
        if needs.gate == "soft" and not needs.mean_gate and not self.soft:
            found.append(
                Problem(
                    "cannot weigh experts by a sigmoid of their scores (gate 'soft')",
                    "Factor with --gate hard.",
                    lambda n: replace(n, mean_gate=True),
                    "every layer's experts are weighed by their mean weight",
                )
            )
        if self.shared == "no" and needs.container_shared:
            without = Layout(0, layout.shared + layout.active, layout.slices)
            found.append(
                Problem(
                    "has no shared neurons",
                    f"The nearest layout that works is {without}.",
                    lambda n: replace(n, copy_shared=True),
                    f"the shared neurons go into each of the {needs.routed} experts: the same logits, computed "
                    f"{needs.active} times a token",
                )
            )
        if self.shared == "always" and not needs.container_shared:
            with_one = Layout(1, max(1, layout.active - 1), layout.slices)
            found.append(Problem("must have shared neurons", f"The nearest layout that works is {with_one}."))
        return found


ROUTED = ("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
"""Names of the router, the gate-up and the down projections below a layer, in containers that use the name "mlp"."""


def routed_tensors(block: Block) -> dict[str, Tensor]:
    """The router's and the experts' tensors by the names of `ROUTED`."""
    return dict(zip(ROUTED, (block.router, block.gate_up, block.down), strict=True))


class Unshared(Container):
    """A container without shared neurons. It takes the softmax over all experts and renormalises the top K."""

    shared = "no"

    def scoring(self, needs: Needs) -> Scoring:
        return Scoring("softmax")

    def tensors(self, block: Block) -> dict[str, Tensor]:
        return routed_tensors(block)

    def block(self, tensors: Mapping[str, Tensor]) -> Block:
        return Block(*(tensors[name] for name in ROUTED))
