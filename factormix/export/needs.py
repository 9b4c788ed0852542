"""Read the needs of a factored model: what a container must hold, in its backbone and its sparse FFNs."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from factormix.export.backbone import Backbone, read_backbone
from factormix.nn import FactorMixMixin, Layout, SparseSpec, base_class, refuse_quantised, vocabulary_head
from factormix.nn.sparse_ffn import OutputWeight
from factormix.run.errors import FactorMixError


@dataclass(frozen=True)
class Needs:
    """What a container must hold. The last five fields are changes that `--approximate` may make.

    Attributes:
        backbone: the parts that are not FFNs.
        specs: the shapes of the sparse FFNs, layer by layer.
        active: K, the experts that run for a token; the largest if layers differ.
        routed: R, the experts of a layer; the largest if layers differ.
        width: W, the neurons of an expert; the largest if layers differ, and narrower experts get zero neurons.
        shared: number of shared neurons; the largest if layers differ, and other layers get zero neurons.
        gate: how a chosen expert's output is multiplied, see `SparseFFN`.
        copy_shared: put the shared neurons, divided by K, into every expert. The sum stays, at K times the cost.
        most_active: run the largest K in every layer.
        drop_bias: leave out the FFNs' biases.
        mean_gate: replace a gate that differs by token by its mean.
        cut_context: the most positions of the container, or None for the model's own.
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
        """The layout of the first sparse FFN."""
        return self.specs[0].layout

    @property
    def biased(self) -> bool:
        """True if an FFN has biases that must be kept."""
        return not self.drop_bias and any(spec.up_bias or spec.down_bias for spec in self.specs)

    @property
    def uneven(self) -> bool:
        """True if layers differ in K and must keep it."""
        return not self.most_active and len({spec.active for spec in self.specs}) > 1

    @property
    def container_shared(self) -> int:
        """Number of shared neurons that the container must hold as shared ones."""
        return 0 if self.copy_shared else self.shared

    @property
    def container_width(self) -> int:
        """Number of neurons of an expert in the container."""
        return self.width + (self.shared if self.copy_shared else 0)


def read_needs(model: PreTrainedModel) -> Needs:
    """Read the needs of `model`.

    Raises:
        FactorMixError: the model is not factored, has no next-token head, or has a part that no container can hold
            even with `--approximate`: dense FFNs among sparse ones, FFNs without a gate projection, a router that is
            not linear, or no routed experts.
    """
    if not isinstance(model, FactorMixMixin):
        raise FactorMixError(
            f"{type(model).__name__} has no sparse FFN, and other engines load a dense model unchanged. To export a "
            "sparse model, run `factormix factor` first."
        )
    if vocabulary_head(model) != "causal":
        raise FactorMixError(
            f"{base_class(model).__name__} does not predict next tokens; allowed: causal language models "
            "(...ForCausalLM), because the engines' containers are such models. Use factormix.load."
        )
    refuse_quantised(model, "a container")
    backbone = read_backbone(model.config)
    specs = tuple(ffn.spec for ffn in model.sparse_ffns().values())
    layers = backbone.common["num_hidden_layers"]
    if len(specs) < layers:
        raise FactorMixError(
            f"{layers - len(specs)} of {layers} FFNs are dense, but a container has experts in every layer. Factor all "
            "layers, by leaving out `layers`."
        )
    other = next((spec.router for spec in specs if spec.router != "linear"), None)
    if other:
        raise FactorMixError(
            f"the routers are of kind {other!r}, but the router of every container is one linear layer."
        )
    if not all(spec.gated for spec in specs):
        raise FactorMixError("the FFNs have no gate projection, but the experts of every container have one.")
    pruned = [spec.layout for spec in specs if not spec.layout.routed]
    whole = [layout for layout in pruned if not layout.dropped]
    if whole and len(whole) < len(specs):
        raise FactorMixError(
            f"{len(whole)} of {len(specs)} FFNs run whole ({whole[0]}), because --allocation global found errors most "
            "costly there. A container has experts in every layer. Factor with --allocation uniform."
        )
    if pruned:
        raise FactorMixError(
            f"layout {pruned[0]} routes nothing, because it is static pruning, and a container needs experts. Factor "
            f"with a layout of at least one active expert, such as {_with_an_expert(pruned[0])}."
        )
    return Needs(
        backbone,
        specs,
        active=max(spec.active for spec in specs),
        routed=max(spec.layout.routed for spec in specs),
        width=max(spec.width for spec in specs),
        shared=max(spec.shared * spec.width for spec in specs),
        gate=specs[0].output_weight,
    )


def _with_an_expert(pruned: Layout) -> Layout:
    return Layout(pruned.shared - 1, 1, pruned.slices)
