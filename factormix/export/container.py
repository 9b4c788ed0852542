"""Container: one stock MoE architecture that a factored model can be written as; containers/ has a file for each.

A container says what it cannot hold (`problems`), how its router scores (`scoring`), its config (`config`) and the
names of a sparse FFN's tensors (`tensors`). All else of a decoder has the same names in these families and containers.
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
    """Something that a container cannot hold.

    Attributes:
        reason: a clause with the container as its subject.
        remedy: what to do instead, a sentence.
        fix: what `--approximate` makes of the needs; None where it cannot help.
        costs: what the fix does to the model, a clause.
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
        down: (R, H, W), times what the container's weights lack.
        shared_gate_up: (2S, H), gate rows first; None without shared neurons.
        shared_down: (H, S).
    """

    router: Tensor
    gate_up: Tensor
    down: Tensor
    shared_gate_up: Tensor | None = None
    shared_down: Tensor | None = None


class Container(ABC):
    """A stock architecture; the class attributes say what it has a place for.

    Attributes:
        name: what ``--to`` takes.
        config_class, model_class: transformers'.
        router_name: the router's module below a layer; its forward returns (logits, weights, chosen).
        qk_norms: kinds of `Backbone.qk_norm` it has.
        norm: `Backbone.norm` it has.
        biases: pairs (q/k/v, output) of attention biases it can have.
        qkv_zeros: q, k and v biases are written even where a model has none, as zeros.
        windows: "none", "all" (every layer or none) or "layers" (layer by layer).
        multipliers: whether it has Granite's.
        shared: "no", "yes" or "always" (it must have shared neurons).
        flips: share of (token, layer) decisions that may differ from FactorMix's in parity.
        beyond_ties: share of those that may differ though they were no tie.
        about: one sentence for `auto`'s reason and the docs.
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
        """How its router scores, as it is to be configured."""

    @abstractmethod
    def own_config(self, needs: Needs) -> dict[str, Any]:
        """Config fields beyond `backbone.COMMON`."""

    @abstractmethod
    def tensors(self, block: Block) -> dict[str, Tensor]:
        """One layer's FFN tensors by transformers' names below the layer."""

    @abstractmethod
    def block(self, tensors: Mapping[str, Tensor]) -> Block:
        """The inverse of `tensors`; what the container padded stays padded."""

    def config(self, needs: Needs) -> PretrainedConfig:
        """The config of the exported model."""
        common = copy.deepcopy(dict(needs.backbone.common))
        if needs.cut_context is not None:
            common["max_position_embeddings"] = min(common["max_position_embeddings"], needs.cut_context)
        fields = {**common, "head_dim": needs.backbone.head_dim, **self.own_config(needs)}
        return self.config_class(**fields, architectures=[self.model_class.__name__])

    def problems(self, needs: Needs) -> list[Problem]:
        """All that keeps `needs` from being held exactly; empty where it can be."""
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
            found.append(Problem(
                f"attends to all positions, not to a sliding window of {window} in {sum(backbone.windowed)} layers",
                elsewhere, lambda n: replace(n, cut_context=window),
                f"the context ends at {window} positions, up to which nothing changes",
            ))  # fmt: skip
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
            found.append(Problem(
                f"gives every layer the same number of active experts, not {active}",
                "Factor with --allocation uniform.",
                lambda n: replace(n, most_active=True), f"every layer runs {needs.active} experts",
            ))  # fmt: skip
        if needs.biased:
            found.append(Problem(
                "has no biases in its experts", "Factor a model without FFN biases, or use factormix.load.",
                lambda n: replace(n, drop_bias=True), "the FFNs' biases are left out",
            ))  # fmt: skip
        if needs.gate == "soft" and not needs.mean_gate and not self.soft:
            found.append(Problem(
                "cannot weigh experts by a sigmoid of their scores (gate 'soft')", "Factor with --gate hard.",
                lambda n: replace(n, mean_gate=True), "every layer's experts are weighed by their mean weight",
            ))  # fmt: skip
        if self.shared == "no" and needs.container_shared:
            without = Layout(0, layout.shared + layout.active, layout.slices)
            found.append(Problem(
                "has no shared neurons", f"The nearest layout that works is {without}.",
                lambda n: replace(n, copy_shared=True),
                f"the shared neurons go into each of the {needs.routed} experts: the same logits, computed "
                f"{needs.active} times a token",
            ))  # fmt: skip
        if self.shared == "always" and not needs.container_shared:
            with_one = Layout(1, max(1, layout.active - 1), layout.slices)
            found.append(Problem("must have shared neurons", f"The nearest layout that works is {with_one}."))
        return found


ROUTED = ("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
"""Names below a layer of router, gate-up and down projections, wherever the mixture stands in the FFN's place."""


def routed_tensors(block: Block) -> dict[str, Tensor]:
    """Router and experts by the names of `ROUTED`."""
    return dict(zip(ROUTED, (block.router, block.gate_up, block.down), strict=True))


class Unshared(Container):
    """A mixture and nothing else: no shared neurons, softmax over all experts, the top K renormalised."""

    shared = "no"

    def scoring(self, needs: Needs) -> Scoring:
        return Scoring("softmax")

    def tensors(self, block: Block) -> dict[str, Tensor]:
        return routed_tensors(block)

    def block(self, tensors: Mapping[str, Tensor]) -> Block:
        return Block(*(tensors[name] for name in ROUTED))
