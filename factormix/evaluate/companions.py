"""What a sparse model is timed beside, besides the dense one: what it could reach, and what others make of its experts.

    active-width             a dense model whose FFNs have as many neurons as run for a token: no router, no experts
    transformers-grouped_mm  the sparse model, its experts run by transformers' own `grouped_mm` ...
    transformers-eager       ... or by its loop over experts, the form a stock mixture falls back to

All share their weights with the model they are made from. A dense model is cut to its first neurons: its answers are
worth nothing, its speed is that of a trained one.
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
    """One of `COMPANIONS` for the sparse `model` made from the dense `base`, in eval mode.

    Raises:
        FactorMixError: another name, a model that is not sparse, no base where one is needed, experts that no stock
            module holds.
    """
    choose("companion", name, COMPANIONS)
    if not any(isinstance(module, SparseFFN) for module in model.modules()):
        raise FactorMixError(f"{name} stands beside a sparse model; {type(model).__name__} has no sparse FFN.")
    if name.startswith(_STOCK):
        return stock_experts(model, name.removeprefix(_STOCK))
    if base is None:
        raise FactorMixError(f"{name} is cut from the dense model: name it (--against).")
    return active_width(cast(PreTrainedModel, model), cast(PreTrainedModel, base))


def active_width(model: PreTrainedModel, base: PreTrainedModel) -> PreTrainedModel:
    """A copy of the dense `base` whose FFNs keep as many neurons as `model`'s run for a token: (S + K) * W.

    Raises:
        FactorMixError: `model` is no FactorMix model, or `base` no dense one.
    """
    if not isinstance(model, FactorMixMixin):
        raise FactorMixError(f"active-width needs a FactorMix model without adapters, received {type(model).__name__}.")
    cut, sparse = copy_structure(base), model.sparse_ffns()
    for site in sites_of(cut):
        if site.index in sparse:
            spec = sparse[site.index].spec
            narrow(cut, site, (spec.shared + spec.active) * spec.width)
    return cut.eval()


def stock_experts(model: nn.Module, implementation: str) -> nn.Module:
    """A copy of the sparse `model` that runs its experts by transformers' `MixtralExperts` over the same tensors; its
    router and shared neurons stay ours.

    Raises:
        FactorMixError: FFNs without a gate or with biases, which that module does not hold.
    """
    copied = copy_structure(model)
    for ffn in [module for module in copied.modules() if isinstance(module, SparseFFN)]:
        if ffn.experts is not None:
            ffn.experts = _StockExperts(ffn.experts, implementation)  # type: ignore[assignment]
    return copied.eval()


class _StockExperts(nn.Module):
    """Stands in `RoutedExperts`' place: (T, H), chosen (T, K), scale (T, K) or None -> (T, H)."""

    def __init__(self, experts: RoutedExperts, implementation: str) -> None:
        super().__init__()
        if not experts.gated or experts.up_bias is not None:
            raise FactorMixError(
                f"{_STOCK}{implementation}: transformers' experts have a gate and no bias, this model's differ. Leave "
                "it out."
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
