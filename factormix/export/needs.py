"""Needs: what a factored model asks of a container, backbone and sparse FFNs together."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from factormix.export.backbone import Backbone, read_backbone
from factormix.nn import FactorMixMixin, Layout, SparseSpec, base_class, refuse_quantised, vocabulary_head
from factormix.nn.sparse_ffn import OutputWeight
from factormix.run.errors import FactorMixError


@dataclass(frozen=True)
class Needs:
    """The factored model as a container sees it.

    Attributes:
        backbone: what is not FFN.
        specs: the shapes of the sparse FFNs, layer by layer.
        active: K, experts a token gets; the largest where layers differ (`by_layer` then refuses).
        routed: R, experts a layer has; the largest where layers differ.
        width: W, neurons of an expert; narrower ones get zero neurons.
        shared: neurons that every token gets, 0 for none; fewer get zero neurons.
        gate: what a chosen expert's output is multiplied by, see `SparseFFN`.
        copy_shared: the shared neurons go into every expert, divided by K: the same sum, at K times their cost.
        most_active: every layer gets the largest K.
        drop_bias: biases of FFNs are left out.
        mean_gate: a gate that differs by token is replaced by its mean.
        cut_context: positions that the container is to be limited to.
    """

    backbone: Backbone
    specs: tuple[SparseSpec, ...]
    active: int
    routed: int
    width: int
    shared: int
    gate: OutputWeight
    copy_shared: bool = False
    most_active: bool = False
    drop_bias: bool = False
    mean_gate: bool = False
    cut_context: int | None = None

    @property
    def layout(self) -> Layout:
        """The first sparse FFN's."""
        return self.specs[0].layout

    @property
    def biased(self) -> bool:
        """True where an FFN has biases that are to be kept."""
        return not self.drop_bias and any(spec.up_bias or spec.down_bias for spec in self.specs)

    @property
    def uneven(self) -> bool:
        """True where layers differ in K and are to keep it."""
        return not self.most_active and len({spec.active for spec in self.specs}) > 1

    @property
    def container_shared(self) -> int:
        """Shared neurons that the container itself must hold."""
        return 0 if self.copy_shared else self.shared

    @property
    def container_width(self) -> int:
        """Neurons of an expert in the container."""
        return self.width + (self.shared if self.copy_shared else 0)


def read_needs(model: PreTrainedModel) -> Needs:
    """What `model` asks of a container.

    Raises:
        FactorMixError: not factored, no next-token head, or something that no container has a place for, on request
            or not: dense layers among sparse ones, FFNs without a gate projection, nothing routed.
    """
    if not isinstance(model, FactorMixMixin):
        raise FactorMixError(
            f"{type(model).__name__} has no sparse FFN. Other engines load a dense model as it is; to export a sparse "
            "one, run `factormix factor` first."
        )
    if vocabulary_head(model) != "causal":
        raise FactorMixError(
            f"{base_class(model).__name__} does not predict next tokens; the engines' containers are causal language "
            "models (...ForCausalLM). Use factormix.load."
        )
    refuse_quantised(model, "a container")
    backbone = read_backbone(model.config)
    specs = tuple(ffn.spec for ffn in model.sparse_ffns().values())
    layers = backbone.common["num_hidden_layers"]
    if len(specs) < layers:
        raise FactorMixError(
            f"{layers - len(specs)} of {layers} FFNs are dense; a container has experts in every layer. Factor all "
            "layers (leave `layers` open)."
        )
    other = next((spec.router for spec in specs if spec.router != "linear"), None)
    if other:
        raise FactorMixError(f"the routers are of kind {other!r}; the router of every container is one linear layer.")
    if not all(spec.gated for spec in specs):
        raise FactorMixError("the FFNs have no gate projection; the experts of every container have one.")
    pruned = [spec.layout for spec in specs if not spec.layout.routed]
    whole = [layout for layout in pruned if not layout.dropped]
    if whole and len(whole) < len(specs):
        raise FactorMixError(
            f"{len(whole)} of {len(specs)} FFNs run whole ({whole[0]}), as --allocation global makes them where "
            "errors cost most; a container has experts in every layer. Factor with --allocation uniform."
        )
    if pruned:
        raise FactorMixError(
            f"layout {pruned[0]} routes nothing: it is static pruning, and a container needs experts. Factor with a "
            f"layout of at least one active expert, such as {_with_an_expert(pruned[0])}."
        )
    return Needs(
        backbone, specs,
        active=max(spec.active for spec in specs),
        routed=max(spec.layout.routed for spec in specs),
        width=max(spec.width for spec in specs),
        shared=max(spec.shared * spec.width for spec in specs),
        gate=specs[0].output_weight,
    )  # fmt: skip


def _with_an_expert(pruned: Layout) -> Layout:
    return Layout(pruned.shared - 1, 1, pruned.slices)
