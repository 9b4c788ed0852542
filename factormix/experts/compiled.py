"""A whole sparse FFN as one opaque operator for torch.compile: the C++ call of eager mode, without gradient.

Which experts run depends on the data, which a graph cannot hold. Where this does not serve, the compiler has router and
shared neurons, and the experts alone are opaque (`dispatch.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from factormix.experts import native
from factormix.experts.packed import PackedExperts

# Defined and implemented by hand: `torch.library.custom_op` takes 3 us more a call.
_LIBRARY = torch.library.Library("factormix", "FRAGMENT")
_LIBRARY.define(
    "ffn(Tensor x, Tensor? up, Tensor? down, Tensor? up_bias, Tensor? shared_up, Tensor? shared_down,"
    " Tensor? shared_bias, Tensor? router, str activation, bool gated, int active, int gate, float factor,"
    " Tensor? up_scale=None, Tensor? down_scale=None, Tensor? shared_up_scale=None, Tensor? shared_down_scale=None)"
    " -> Tensor"
)


def serves(x: Tensor, parts: Sequence[PackedExperts], router: Tensor | None) -> bool:
    """Whether torch.compile is tracing something that `forward` computes: the rules of eager mode, but for the number
    of tokens, which a graph need not know."""
    return (
        torch.compiler.is_compiling()
        and x.is_cpu
        and x.dtype in native.DTYPES
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and native.reads_parts(x, parts)
        and (router is None or native.reads(router))
        and _any_tokens()
    )


def forward(
    x: Tensor,
    experts: PackedExperts | None,
    shared: PackedExperts | None,
    router: Tensor | None = None,
    active: int = 0,
    gate: int = native.GIVEN,
    factor: float = 1.0,
) -> Tensor:
    """All of a sparse FFN but its output bias, (T, H) -> (T, H); arguments as `native.plan` has them."""
    some = shared or experts
    assert some is not None
    parts = (experts, shared)
    weights = [None if part is None else getattr(part, n) for part in parts for n in ("up", "down", "up_bias")]
    scales = [None if part is None else getattr(part, n) for part in parts for n in ("up_scale", "down_scale")]
    return torch.ops.factormix.ffn(  # type: ignore[no-any-return]
        x, *weights, router, some.activation, some.gated, active, gate, factor, *scales
    )


@torch.compiler.assume_constant_result  # building the operator is nothing to trace
def _any_tokens() -> bool:
    return native.most_tokens() == sys.maxsize


def _ffn(
    x: Tensor,
    up: Tensor | None,
    down: Tensor | None,
    up_bias: Tensor | None,
    shared_up: Tensor | None,
    shared_down: Tensor | None,
    shared_bias: Tensor | None,
    router: Tensor | None,
    activation: str,
    gated: bool,
    active: int,
    gate: int,
    factor: float,
    up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    shared_up_scale: Tensor | None = None,
    shared_down_scale: Tensor | None = None,
) -> Tensor:
    experts = shared = None
    if up is not None and down is not None:
        experts = PackedExperts(up, down, up_bias, activation, gated, up_scale, down_scale)
    if shared_up is not None and shared_down is not None:
        shared = PackedExperts(
            shared_up, shared_down, shared_bias, activation, gated, shared_up_scale, shared_down_scale
        )
    return native.forward(native.plan(x.dtype, experts, shared, router, active, gate, factor), x)


_LIBRARY.impl("ffn", _ffn, "CPU")
torch.library.register_fake(
    "factormix::ffn", lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format), lib=_LIBRARY
)
