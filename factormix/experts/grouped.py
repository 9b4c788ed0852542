"""Prefill and training: tokens are grouped by expert, each expert runs once on its own tokens.

FLOPs are those of the K chosen experts, K/R of all of them; gradients flow to x, to the scale and to the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from factormix.experts.packed import PackedExperts


def grouped(x: Tensor, chosen: Tensor, scale: Tensor | None, experts: PackedExperts) -> Tensor:
    """Same arguments and result as `reference`: x (T, H), chosen (T, K) -> (T, H).

    The sum over a token's experts runs in the order of the expert index, whatever the batch.
    """
    k = chosen.shape[1]
    if torch.is_grad_enabled() and not experts.int8:
        experts = experts.unstacked(x.dtype)
    order = chosen.flatten().argsort(stable=True)  # (T*K,) token-expert pairs, sorted by expert
    token = order // k  # (T*K,)
    counts = torch.bincount(chosen.flatten(), minlength=len(experts.up)).tolist()  # R numbers
    flat_scale = None if scale is None else scale.flatten()[order].to(x.dtype).unsqueeze(-1)  # (T*K, 1)
    out = x.new_zeros(x.shape)  # (T, H)
    start = 0
    for i, count in enumerate(counts):
        if count == 0:
            continue
        rows = token[start : start + count]  # (N,)
        y = experts.run(i, x.index_select(0, rows))  # (N, H)
        if flat_scale is not None:
            y = y * flat_scale[start : start + count]
        out.index_add_(0, rows, y)
        start += count
    return out
