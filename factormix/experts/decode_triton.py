"""Triton kernels of a few tokens' FFN and of the router; `gpu.py` is their door and the only importer.

Three launches a layer: `route` (scores and the K best), `up` (gathered up projections and the activation), `down` (the
gathered down projections, summed). An expert's rows are read once, whatever the number of tokens that chose it, and
those of an expert nobody chose are not read. The host waits for nothing and no shape depends on the data, so a CUDA
graph can hold all three. No atomic additions: every sum is in one order, so the result is the same each time.

One token runs as matrix-vector products on plain lanes; more run as matrix products of M = 16 rows, the least that
tensor cores take, rows beyond T empty. The neurons between `up` and `down` lie in float32 as (T, S*W + K*W), shared
ones first.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def route(x_ptr, weight_ptr, scores_ptr, chosen_ptr, H, R: tl.constexpr, K: tl.constexpr,
          R_PAD: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """Scores (T, R) float32 and the K best (T, K) int64, best first; of equal ones the lowest, NaN first. Grid (T,).

    x (T, H), weight (R, H), of any floating dtype; summed in float32, for a row in the same order in every batch.
    """
    token = tl.program_id(0).to(tl.int64)
    experts, columns = tl.arange(0, R_PAD), tl.arange(0, C)
    real = experts < R
    total = tl.zeros((R_PAD, C), tl.float32)
    for c in range(0, H, C):
        live = c + columns < H
        x = tl.load(x_ptr + token * H + c + columns, mask=live, other=0).to(tl.float32)  # (C,)
        where = weight_ptr + experts[:, None] * H + c + columns[None, :]
        total += tl.load(where, mask=real[:, None] & live[None, :], other=0).to(tl.float32) * x[None, :]  # (R_PAD, C)
    scores = tl.sum(total, axis=1)  # (R_PAD,)
    tl.store(scores_ptr + token * R + experts, scores, mask=real)
    unknown = scores != scores  # NaN counts as the greatest, as torch.sort has it
    order = tl.where(unknown, float("-inf"), scores)
    free = real
    for k in range(K):
        first = tl.min(tl.where(free & unknown, experts, R_PAD), axis=0)
        best = tl.max(tl.where(free, order, float("-inf")), axis=0)
        pick = tl.min(tl.where(free & (order == best), experts, R_PAD), axis=0)
        pick = tl.where(first < R_PAD, first, pick)
        tl.store(chosen_ptr + token * K + k, pick.to(tl.int64))
        free = free & (experts != pick)


@triton.jit
def _act(z, KIND: tl.constexpr):
    """The activation on float32: 0 silu, 1 gelu, 2 gelu by tanh, 3 relu."""
    if KIND == 0:
        return z * tl.sigmoid(z)
    elif KIND == 1:
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif KIND == 2:
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))  # (1 + tanh(u)) / 2 = sigmoid(2 u)
    else:
        return tl.maximum(z, 0.0)


@triton.jit
def _start(M: tl.constexpr, N: tl.constexpr, C: tl.constexpr):
    """A sum to add products to: (N, C), summed over C at the end, for one token; else (M, N)."""
    if M == 1:
        return tl.zeros((N, C), tl.float32)
    else:
        return tl.zeros((M, N), tl.float32)


@triton.jit
def _add(total, left_ptr, left_live, left_row, weight_ptr, rows, rows_live, columns_live, stride,
         M: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """total += left @ weight.T on C columns: left (M, C) from pointers to its rows' first column, weight (N, C)."""
    columns = tl.arange(0, C)
    where = weight_ptr + rows[:, None].to(tl.int64) * stride + columns[None, :]
    weight = tl.load(where, mask=rows_live[:, None] & columns_live[None, :], other=0)  # (N, C)
    if M == 1:
        left = tl.load(left_ptr + columns, mask=columns_live, other=0)  # (C,)
        return total + weight.to(tl.float32) * left.to(tl.float32)[None, :]
    else:
        where = left_ptr + left_row[:, None] + columns[None, :]
        left = tl.load(where, mask=left_live[:, None] & columns_live[None, :], other=0)  # (M, C)
        return tl.dot(left.to(weight.dtype), tl.trans(weight), total, input_precision="ieee")


@triton.jit
def _finish(total, M: tl.constexpr):
    """The sum as (M, N)."""
    if M == 1:
        return tl.sum(total, axis=1)[None, :]
    else:
        return total


@triton.jit
def _slots(chosen_ptr, expert, T, K: tl.constexpr, K_PAD: tl.constexpr, M: tl.constexpr):
    """For M tokens: whether each chose `expert`, and at which of its K places."""
    tokens, places = tl.arange(0, M), tl.arange(0, K_PAD)
    live = (tokens < T)[:, None] & (places < K)[None, :]
    chosen = tl.load(chosen_ptr + tokens[:, None] * K + places[None, :], mask=live, other=-1)  # (M, K_PAD)
    match = (chosen == expert).to(tl.int32)
    return tl.max(match, axis=1) > 0, tl.sum(match * places[None, :], axis=1)  # (M,), (M,)


@triton.jit
def _up_rows(x_ptr, weight_ptr, bias_ptr, rows, width, H, T,
             GATED: tl.constexpr, BIASED: tl.constexpr, KIND: tl.constexpr,
             M: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """Post-activation neurons (M, N) of the N `rows` of one FFN, for all tokens."""
    N: tl.constexpr = rows.shape[0]
    tokens = tl.arange(0, M)
    live, columns = rows < width, tl.arange(0, C)
    first = _start(M, N, C)
    second = _start(M, N, C)
    for c in range(0, H, C):
        seen = c + columns < H
        left = tokens * H
        first = _add(first, x_ptr + c, tokens < T, left, weight_ptr + c, rows, live, seen, H, M, C)
        if GATED:
            second = _add(second, x_ptr + c, tokens < T, left, weight_ptr + c, rows + width, live, seen, H, M, C)
    neurons = _finish(first, M)  # (M, N)
    if BIASED:
        neurons += tl.load(bias_ptr + rows, mask=live, other=0).to(tl.float32)[None, :]
    neurons = _act(neurons, KIND)
    if GATED:
        value = _finish(second, M)
        if BIASED:
            value += tl.load(bias_ptr + width + rows, mask=live, other=0).to(tl.float32)[None, :]
        neurons *= value
    return neurons


@triton.jit
def up(x_ptr, chosen_ptr, scale_ptr, up_ptr, bias_ptr, shared_up_ptr, shared_bias_ptr, neurons_ptr,
       T, H, W, SW, shared_blocks, blocks,
       K: tl.constexpr, K_PAD: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr, SCALED: tl.constexpr,
       KIND: tl.constexpr, M: tl.constexpr, N: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """Neurons (T, SW + K*W) float32. Grid: blocks of N shared neurons, then of each expert's (one token: each pick's).

    x (T, H), chosen (T, K), scale (T, K), up (R, W or 2W, H), its bias (R, W or 2W), shared likewise with R = 1.
    """
    block = tl.program_id(0)
    tokens, lanes = tl.arange(0, M), tl.arange(0, N)
    stride = SW + K * W
    if block < shared_blocks:
        rows = block * N + lanes
        neurons = _up_rows(x_ptr, shared_up_ptr, shared_bias_ptr, rows, SW, H, T, GATED, BIASED, KIND, M, C)
        where = neurons_ptr + tokens[:, None] * stride + rows[None, :]
        tl.store(where, neurons, mask=(tokens < T)[:, None] & (rows < SW)[None, :])
    elif K > 0:
        rows = (block - shared_blocks) % blocks * N + lanes
        expert = ((block - shared_blocks) // blocks).to(tl.int64)
        if M == 1:
            expert = tl.load(chosen_ptr + expert)
        hit, slot = _slots(chosen_ptr, expert, T, K, K_PAD, M)  # (M,), (M,)
        if tl.max(hit.to(tl.int32), axis=0) > 0:
            height = W * (2 if GATED else 1)
            weight, bias = up_ptr + expert * height * H, bias_ptr + expert * height
            neurons = _up_rows(x_ptr, weight, bias, rows, W, H, T, GATED, BIASED, KIND, M, C)
            if SCALED:
                neurons *= tl.load(scale_ptr + tokens * K + slot, mask=hit, other=0).to(tl.float32)[:, None]
            where = neurons_ptr + (tokens * stride + SW + slot * W)[:, None] + rows[None, :]
            tl.store(where, neurons, mask=hit[:, None] & (rows < W)[None, :])


@triton.jit
def down(neurons_ptr, chosen_ptr, down_ptr, shared_down_ptr, y_ptr, T, H, W, SW, R,
         K: tl.constexpr, K_PAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """y (T, H): shared neurons, then each chosen expert's, through their down projections. Grid: blocks of N outputs.

    neurons (T, SW + K*W) float32, chosen (T, K), down (R, H, W), shared_down (H, SW). One token: experts in the order
    of its choice; more: in the order of their numbers.
    """
    rows = tl.program_id(0) * N + tl.arange(0, N)
    live, tokens, columns = rows < H, tl.arange(0, M), tl.arange(0, C)
    stride = SW + K * W
    total = _start(M, N, C)
    for c in range(0, SW, C):
        left = tokens * stride
        total = _add(
            total, neurons_ptr + c, tokens < T, left, shared_down_ptr + c, rows, live, c + columns < SW, SW, M, C
        )
    if K > 0:
        for i in range(0, K if M == 1 else R):
            expert = tl.full((), i, tl.int64)
            if M == 1:
                expert = tl.load(chosen_ptr + i)
            hit, slot = _slots(chosen_ptr, expert, T, K, K_PAD, M)  # (M,), (M,)
            if tl.max(hit.to(tl.int32), axis=0) > 0:
                weight = down_ptr + expert * H * W
                for c in range(0, W, C):
                    left, seen = tokens * stride + SW + slot * W, c + columns < W
                    left_ptr = neurons_ptr + (SW + i * W + c if M == 1 else c)
                    total = _add(total, left_ptr, hit, left, weight + c, rows, live, seen, W, M, C)
    y = _finish(total, M)  # (M, N)
    where = y_ptr + tokens[:, None] * H + rows[None, :]
    tl.store(where, y.to(y_ptr.dtype.element_ty), mask=(tokens < T)[:, None] & live[None, :])
