"""Decoding: a handful of tokens, each runs its own K experts straight from their blocks.

At one token an FFN is bound by the bytes it reads, so each chosen expert's block is multiplied where it lies. One
exception was measured: below float32, PyTorch's CPU products have a cost a call that is larger than copying the K down
blocks (a third of what is read) side by side for a single product. Without gradients; `grouped` has them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from factormix.experts.packed import PackedExperts


def tokenwise(x: Tensor, chosen: Tensor, scale: Tensor | None, experts: PackedExperts) -> Tensor:
    """Same arguments and result as `reference`, for few tokens: x (T, H), chosen (T, K) -> (T, H)."""
    rows = [
        _one(x[t : t + 1], picks, None if scale is None else scale[t], experts)
        for t, picks in enumerate(chosen.tolist())
    ]
    return torch.cat(rows) if rows else torch.zeros_like(x)  # (T, H)


def _one(x: Tensor, picks: list[int], scale: Tensor | None, experts: PackedExperts) -> Tensor:
    """One token: x (1, H), scale (K,) or None -> (1, H)."""
    bias = experts.up_bias
    projected = torch.cat([F.linear(x, experts.up[i], None if bias is None else bias[i]) for i in picks])  # (K, 2W)
    h = experts.neurons(projected)  # (K, W)
    if scale is not None:
        h = h * scale.to(h.dtype).unsqueeze(-1)  # (K, W)
    if x.dtype != torch.float32:
        down = torch.cat([experts.down[i] for i in picks], dim=1)  # (H, K*W)
        return F.linear(h.view(1, -1), down)  # (1, H)
    out = torch.mv(experts.down[picks[0]], h[0])  # (H,)
    for k, i in enumerate(picks[1:], start=1):
        out.addmv_(experts.down[i], h[k])
    return out.unsqueeze(0)  # (1, H)
