"""Which path runs: the C++ operator where it serves, a GPU's kernels where they do; else by the number of tokens and
whether gradients are wanted. Where torch.compile is tracing, all of it is one opaque operator."""

from __future__ import annotations

import torch
from torch import Tensor

from factormix.experts import gpu, grouped_mm, native
from factormix.experts.grouped import grouped
from factormix.experts.packed import PackedExperts
from factormix.experts.tokenwise import tokenwise
from factormix.run.errors import FactorMixError

DECODE_TOKENS = 4  # up to this many tokens, PyTorch's matrix-vector products beat grouping


def run_experts(x: Tensor, chosen: Tensor, scale: Tensor | None, experts: PackedExperts) -> Tensor:
    """Weighted sum of each token's chosen experts; only these run.

    Args:
        x: (T, H) in the experts' dtype; under autocast in any.
        chosen: (T, K) int64, distinct in a row.
        scale: (T, K) or None for 1.
        experts: the packed weights.

    Returns:
        (T, H) in x's dtype; under autocast in autocast's.

    Raises:
        FactorMixError: a gradient through int8 weights, which are for inference.
    """
    if experts.int8 and torch.is_grad_enabled() and x.requires_grad:
        raise FactorMixError(
            "a gradient was asked through int8 weights, which are for inference: load the model without quantising to "
            "train it, or run it under torch.no_grad()."
        )
    if torch.is_autocast_enabled(x.device.type):  # the addition into x's dtype must not meet a mix of dtypes
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        return _compiled(
            x, chosen, scale, experts.up, experts.down, experts.up_bias, experts.activation, experts.gated,
            experts.up_scale, experts.down_scale,
        )  # fmt: skip
    return _eager(x, chosen, scale, experts)


def _eager(x: Tensor, chosen: Tensor, scale: Tensor | None, experts: PackedExperts) -> Tensor:
    if native.serves(x, [experts]):
        return native.decode(x, chosen, scale, experts, None)
    if experts.int8:
        return grouped(x, chosen, scale, experts)
    few = len(x) <= DECODE_TOKENS and x.device.type == "cpu"
    if few and not torch.is_grad_enabled():
        return tokenwise(x, chosen, scale, experts)
    if gpu.serves(x, [experts]):
        return gpu.decode(x, chosen, scale, experts, None)
    if grouped_mm.serves(x, experts):
        return grouped_mm.grouped_mm(x, chosen, scale, experts)
    return grouped(x, chosen, scale, experts)


@torch.library.custom_op("factormix::run_experts", mutates_args=())
def _compiled(
    x: Tensor,
    chosen: Tensor,
    scale: Tensor | None,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    activation: str,
    gated: bool,
    up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> Tensor:
    """One opaque operator for torch.compile: which experts run depends on the data, which a graph cannot hold."""
    # the graph was traced under autocast, which does not reach inside an operator
    mixed = up_scale is None and x.dtype != up.dtype
    with torch.autocast(x.device.type, dtype=x.dtype if mixed else None, enabled=mixed):
        experts = PackedExperts(up, down, up_bias, activation, gated, up_scale, down_scale)
        return _eager(x, chosen, scale, experts)


@_compiled.register_fake
def _(x, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)
