"""Make the models that are timed beside a sparse model, in addition to the dense one.

    active-width             a dense model with as many neurons as run for a token, without router and experts
    transformers-grouped_mm  the sparse model with its experts run by transformers' `grouped_mm`
    transformers-eager       the sparse model with its experts run by transformers' loop over experts, its fallback

The first shows what speed is possible, the others how fast transformers runs the same experts. All share their weights
with the model they are made from. active-width keeps the first neurons of each FFN: its answers are useless, but its
speed equals that of a trained model.
"""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from factormix.ffn import copy_structure, narrow
from factormix.nn import FactorMixMixin, RoutedExperts, SparseFFN, sites_of
from factormix.run.errors import FactorMixError, choose

Companion = Literal["active-width", "transformers-grouped_mm", "transformers-eager"]
COMPANIONS: tuple[str, ...] = get_args(Companion)
_STOCK = "transformers-"


def companion(name: str, model: nn.Module, base: nn.Module | None) -> nn.Module:
    """Make one of `COMPANIONS`, in eval mode.

    Args:
        name: which one.
        model: the sparse model; it stays unchanged.
        base: the dense model it was made from. Only active-width needs it.

    Raises:
        FactorMixError: the name is unknown, the model is not sparse, the base is missing, or transformers' experts
            cannot hold the model's.
    """
    choose("companion", name, COMPANIONS)
    if not any(isinstance(module, SparseFFN) for module in model.modules()):
        raise FactorMixError(f"{name} is timed beside a sparse model, but {type(model).__name__} has no sparse FFN.")
    if name.startswith(_STOCK):
        return stock_experts(model, name.removeprefix(_STOCK))
    if base is None:
        raise FactorMixError(f"{name} is cut from the dense model; name the dense model with --against.")
    return active_width(cast(PreTrainedModel, model), cast(PreTrainedModel, base))


def active_width(model: PreTrainedModel, base: PreTrainedModel) -> PreTrainedModel:
    """A copy of the dense `base` whose FFNs keep the first (S + K) * W neurons, as many as run for a token in `model`.

    Raises:
        FactorMixError: `model` is no FactorMix model, or `base` is not dense.
    """
    if not isinstance(model, FactorMixMixin):
        raise FactorMixError(f"active-width received {type(model).__name__}; allowed: a FactorMix model, no adapters.")
    cut, sparse = copy_structure(base), model.sparse_ffns()
    for site in sites_of(cut):
        if site.index in sparse:
            spec = sparse[site.index].spec
            narrow(cut, site, (spec.shared + spec.active) * spec.width)
    return cut.eval()


def stock_experts(model: nn.Module, implementation: str) -> nn.Module:
    """A copy of the sparse `model` whose experts run in transformers' `MixtralExperts`, over the same tensors.

    The router and the shared neurons still run in FactorMix.

    Args:
        model: the sparse model; it stays unchanged.
        implementation: "grouped_mm" or "eager".

    Raises:
        FactorMixError: the FFNs have no gate or have biases, which `MixtralExperts` cannot hold.
    """
    copied = copy_structure(model)
    for ffn in [module for module in copied.modules() if isinstance(module, SparseFFN)]:
        if ffn.experts is not None:
            ffn.experts = _StockExperts(ffn.experts, implementation)  # type: ignore[assignment]
    return copied.eval()


class _StockExperts(nn.Module):
    """Replaces `RoutedExperts`: x (T, H), chosen (T, K), scale (T, K) or None -> (T, H)."""

    def __init__(self, experts: RoutedExperts, implementation: str) -> None:
        super().__init__()
        if not experts.gated or experts.up_bias is not None:
            raise FactorMixError(
                f"{_STOCK}{implementation} cannot run this model, because transformers' experts have a gate and no "
                "bias. Leave it out."
            )
        routed, hidden, width = experts.down_proj.shape
        config = MixtralConfig(
            hidden_size=hidden, intermediate_size=width, num_local_experts=routed, hidden_act=experts.activation
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            self.stock = MixtralExperts(config)
        self.stock.gate_up_proj, self.stock.down_proj = cast(nn.Parameter, experts.gate_up_proj), experts.down_proj

    def forward(self, x: Tensor, chosen: Tensor, scale: Tensor | None) -> Tensor:
        weights = x.new_ones(chosen.shape) if scale is None else scale.to(x.dtype)  # (T, K)
        return cast(Tensor, self.stock(x, chosen, weights))
