"""Decoding: a handful of tokens, each runs its own K experts straight from their blocks.

At one token an FFN is bound by the bytes it reads. So each chosen expert's block is multiplied where it lies, by
matrix-vector products that write into one (K, 2W) buffer: 2K products and one activation a token, nothing copied.
Without gradients; `grouped` has them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from factormix.experts.packed import PackedExperts


def tokenwise(x: Tensor, chosen: Tensor, scale: Tensor | None, experts: PackedExperts) -> Tensor:
    """Same arguments and result as `reference`, for few tokens: x (T, H), chosen (T, K) -> (T, H)."""
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)  # (T, H)
    projected = x.new_empty(chosen.shape[1], experts.up.shape[1])  # (K, 2W)
    for t, picks in enumerate(chosen.tolist()):
        for k, i in enumerate(picks):
            torch.mv(experts.up[i], x[t], out=projected[k])
            if experts.up_bias is not None:
                projected[k] += experts.up_bias[i]
        h = experts.neurons(projected)  # (K, W)
        if scale is not None:
            h = h * scale[t].to(h.dtype).unsqueeze(-1)  # (K, W)
        for k, i in enumerate(picks):
            out[t].addmv_(experts.down[i], h[k])
    return out
