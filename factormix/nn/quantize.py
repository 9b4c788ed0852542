"""Quantise: the FFNs of a model get int8 weights, in place.

    model = factormix.load(path, quantize="int8")
    model = quantize(model)                          # or any dense model that FactorMix can factor

Attention, embeddings, norms, biases, routers and the output head stay as they are. A dense FFN becomes a SparseFFN
whose neurons are all shared, and so runs by the same operator: no product of int8 weights that PyTorch has on a CPU is
as fast (docs/speed.md), and dense and sparse are compared on equal terms.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from factormix.experts import PackedExperts
from factormix.ffn import FFNSite, FFNWeights, swap, weights
from factormix.nn.int8 import Int8Neurons
from factormix.nn.model import FactorMixMixin, adopt, sites_of
from factormix.nn.sparse_ffn import SparseFFN, SparseSpec
from factormix.run.errors import FactorMixError, choose

Quantize = Literal["int8"]
M = TypeVar("M", bound=PreTrainedModel)


def check_quantize(name: str | None) -> None:
    """Refuse a way to quantise that is not there.

    Raises:
        FactorMixError: not "int8" nor None.
    """
    if name is not None:
        choose("quantize", name, get_args(Quantize))


@torch.no_grad()
def quantize(model: M) -> M:
    """Give the FFNs of `model` int8 weights with a float32 scale a row, in place; a second call changes nothing.

    For inference: no parameter of the model can be trained any more, and it cannot be saved. Quantise anew after
    loading, which takes a second or two for a billion parameters.

    Args:
        model: a FactorMix model, or a dense one of a family that can be factored; it becomes a FactorMix model.

    Returns:
        The same object.

    Raises:
        FactorMixError: a family that is not known, weights that are quantised already in another way.
    """
    config = cast(PreTrainedModel, model).config
    sparse: dict[int, SparseFFN] = cast(Any, model).sparse_ffns() if isinstance(model, FactorMixMixin) else {}
    specs: dict[FFNSite, SparseSpec] = {}
    for site in sites_of(model):
        ffn = sparse.get(site.index)
        if ffn is None:
            ffn = _all_shared(site, weights(model, site))
            swap(model, site, ffn)
        specs[site] = ffn.spec
        for name in ("shared", "experts"):
            part = getattr(ffn, name)
            if part is not None and not isinstance(part, Int8Neurons):
                setattr(ffn, name, Int8Neurons(part.packed()).train(part.training))
    if len(specs) > len(sparse):
        made_by = config.factormix["made_by"] if sparse else {"by": "quantize"}
        adopt(model, specs, made_by)
    return model.requires_grad_(False)


def refuse_quantised(model: nn.Module, what: str) -> None:
    """Raise where a model has int8 weights and `what` cannot hold them.

    Raises:
        FactorMixError: such weights.
    """
    if any(isinstance(module, Int8Neurons) for module in model.modules()):
        raise FactorMixError(
            f"this model has int8 weights, which {what} does not hold: make it from the model as it was before "
            "quantising, and quantise when it is loaded."
        )


def _all_shared(site: FFNSite, parts: FFNWeights) -> SparseFFN:
    """A dense FFN as one slice that is always on, its neurons int8."""
    bias = parts.stacked_biases()
    biased = bias is not None
    spec = SparseSpec(
        site.hidden, site.inner, 1, 0, 1, site.activation, site.gated, up_bias=biased, down_bias=site.down_bias
    )
    with torch.device("meta"):
        ffn = SparseFFN(spec)
    up = torch.cat(parts.stacked())[None]  # (1, I or 2I, H)
    up_bias = None if bias is None else torch.cat(bias)[None]  # (1, I or 2I)
    packed = PackedExperts(up, parts.down.T[None], up_bias, site.activation, site.gated)
    ffn.shared = Int8Neurons(packed)  # type: ignore[assignment]
    if ffn.bias is not None and parts.down_bias is not None:
        ffn.bias = nn.Parameter(parts.down_bias.detach().clone())
    return ffn.eval()
