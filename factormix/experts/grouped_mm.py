"""Prefill and training on a GPU: PyTorch's grouped matrix product, one launch for all experts' tokens.

The host never learns how many tokens an expert has, so nothing waits for the device: pairs of token and expert are
sorted by expert on the device, and each product is told where an expert's rows end. FLOPs are those of the chosen
experts. Sums are in a fixed order, without atomic additions, so the result and the gradients are the same each time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from factormix.experts.packed import PackedExperts

ALIGNMENT = 16  # bytes: what the product asks of the strides of its operands
MIN_CAPABILITY = (8, 0)  # 9.0 and 10.x have the fused kernel; PyTorch does the others by a loop of its own, with a sync


def serves(x: Tensor, experts: PackedExperts) -> bool:
    """Whether `grouped_mm` computes this: bfloat16 on a CUDA device, rows of a multiple of 16 bytes."""
    return (
        x.device.type == "cuda"
        and torch.version.hip is None
        and x.dtype == torch.bfloat16
        and aligned(x, experts)
        and torch.cuda.get_device_capability(x.device) >= MIN_CAPABILITY
    )


def aligned(x: Tensor, experts: PackedExperts) -> bool:
    """Whether the hidden size, the width and where the weights begin are multiples of `ALIGNMENT` bytes."""
    assert isinstance(experts.up, Tensor) and isinstance(experts.down, Tensor)
    sizes = (*experts.down.shape[1:], experts.up.shape[1], experts.up.storage_offset(), experts.down.storage_offset())
    return all(size * x.element_size() % ALIGNMENT == 0 for size in sizes)


def grouped_mm(x: Tensor, chosen: Tensor, scale: Tensor | None, experts: PackedExperts) -> Tensor:
    """Same arguments and result as `reference`: x (T, H), chosen (T, K) -> (T, H), where `aligned`."""
    assert isinstance(experts.up, Tensor) and isinstance(experts.down, Tensor)
    k = chosen.shape[1]
    pairs, order = chosen.flatten().sort(stable=True)  # (T*K,) experts in order, and which pair each was
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))  # its inverse
    numbers = torch.arange(len(experts.up), device=x.device)
    ends = torch.searchsorted(pairs, numbers, right=True, out_int32=True)  # (R,) where each expert's pairs end
    rows = _Take.apply(x, order // k, place, k)  # (T*K, H)
    projected = _GroupedLinear.apply(rows, experts.up.to(x.dtype), ends)  # (T*K, 2W)
    if experts.up_bias is not None:
        projected = projected + experts.up_bias[pairs].to(x.dtype)
    neurons = experts.neurons(projected)  # (T*K, W)
    if scale is not None:
        neurons = neurons * scale.flatten()[order].to(x.dtype).unsqueeze(-1)
    y = _GroupedLinear.apply(neurons, experts.down.to(x.dtype), ends)  # (T*K, H)
    return _Take.apply(y, place, order, 1).view(*chosen.shape, -1).sum(1)  # type: ignore[no-any-return] # (T, H)


class _Take(torch.autograd.Function):
    """rows[index]; every row is taken k times. The gradient is gathered and summed: an index_add would be atomic."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, place: Tensor, k: int) -> Tensor:
        """rows (N, H), index (N*k,), place (N*k,): where the copies of each row went -> (N*k, H)."""
        ctx.save_for_backward(place)
        ctx.k = k
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (place,) = ctx.saved_tensors
        rows = grad.index_select(0, place)  # (N*k, H)
        return (rows if ctx.k == 1 else rows.unflatten(0, (-1, ctx.k)).sum(1)), None, None, None


class _GroupedLinear(torch.autograd.Function):
    """rows @ weight[expert].T, rows sorted by expert.

    PyTorch's own backward wants gradients of certain strides, and on some cards leaves the weight gradient of an expert
    without rows unset (pytorch issue 172439); here those are zero.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        """rows (N, A), weight (R, B, A), ends (R,) int32 -> (N, B)."""
        ctx.save_for_backward(rows, weight, ends)
        return _product(rows, weight.transpose(1, 2), ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        rows, weight, ends = ctx.saved_tensors
        grad, of_rows, of_weight = grad.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            of_rows = _product(grad, weight, ends)  # (N, A)
        if ctx.needs_input_grad[1]:
            of_weight = _product(grad.t(), rows, ends)  # (R, B, A)
            empty = ends == torch.cat([ends.new_zeros(1), ends[:-1]])  # (R,)
            of_weight = of_weight.masked_fill(empty[:, None, None], 0)
        return of_rows, of_weight, None


def _product(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return torch._grouped_mm(left, right, offs=ends)
