"""The door to the Triton kernels (`decode_triton.py`): decoding and routing on a GPU.

Triton comes with PyTorch's builds for CUDA and is imported at the first call; without it PyTorch's operators run. For
torch.compile both are opaque operators. Nothing here waits for the device, so a CUDA graph can hold it.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from factormix.experts import native
from factormix.experts.packed import PackedExperts

DEVICE = "cuda"
TOKENS = 16  # at most: the rows of one matrix product on tensor cores
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INSTALLED = importlib.util.find_spec("triton") is not None


def serves(x: Tensor, parts: Sequence[PackedExperts]) -> bool:
    """Whether `decode` computes this: a few tokens on a GPU, no gradient or autocast; else PyTorch's operators do."""
    return (
        _ready(x)
        and 0 < len(x) <= TOKENS
        and all(part.activation in native.ACTIVATIONS and part.lie_ready(x) and not part.int8 for part in parts)
        and len({(part.activation, part.gated, part.up_bias is None) for part in parts}) == 1
    )


def routes(x: Tensor) -> bool:
    """Whether `route` computes this: any number of tokens on a GPU, no gradient."""
    return _ready(x) and len(x) > 0


def decode(
    x: Tensor, chosen: Tensor | None, scale: Tensor | None, experts: PackedExperts | None, shared: PackedExperts | None
) -> Tensor:
    """Shared neurons and chosen experts of a few tokens, in two launches.

    Args:
        x: (T, H), T at most `TOKENS`.
        chosen: (T, K) int64, experts that exist, distinct in a row; None without experts.
        scale: (T, K) or None for 1.
        experts: of R experts, or None.
        shared: of one "expert", the shared neurons, or None. Of the same activation and form as the experts.

    Returns:
        (T, H) in x's dtype; summed in float32.
    """
    some = experts or shared
    assert some is not None
    run: Any = torch.ops.factormix.gpu_decode if torch.compiler.is_compiling() else _decode
    up, down, bias = (None, None, None) if experts is None else (experts.up, experts.down, experts.up_bias)
    parts = (None, None, None) if shared is None else (shared.up, shared.down, shared.up_bias)
    return run(x, chosen, scale, up, down, bias, *parts, some.activation, some.gated)  # type: ignore[no-any-return]


def route(x: Tensor, weight: Tensor, active: int) -> tuple[Tensor, Tensor]:
    """A linear router in one launch; equal rows get equal scores in any batch.

    Args:
        x: (T, H).
        weight: (R, H).
        active: K.

    Returns:
        scores (T, R) float32 and the K best (T, K) int64, best first; of equal scores, the lowest expert.
    """
    run: Any = torch.ops.factormix.gpu_route if torch.compiler.is_compiling() else _route
    return run(x, weight, active)  # type: ignore[no-any-return]


def _decode(
    x: Tensor,
    chosen: Tensor | None,
    scale: Tensor | None,
    up: Tensor | None,
    down: Tensor | None,
    bias: Tensor | None,
    shared_up: Tensor | None,
    shared_down: Tensor | None,
    shared_bias: Tensor | None,
    activation: str,
    gated: bool,
) -> Tensor:
    kernels, (tokens, hidden) = _kernels(), x.shape
    routed, width = (0, 1) if down is None else (down.shape[0], down.shape[2])
    active = 0 if chosen is None else chosen.shape[1]
    shared_width = 0 if shared_down is None else shared_down.shape[2]
    x, chosen, scale = x.contiguous(), _contiguous(chosen), _contiguous(scale)
    neurons = x.new_empty(tokens, shared_width + active * width, dtype=torch.float32)
    y = torch.empty_like(x)
    # One token: few rows a block, so that each multiprocessor has several blocks' loads in flight. Tensor cores want 16
    # rows and more; float32 does without them, so fewer columns at a time, or registers spill (ptxas, sm_80 and sm_90).
    rows, most, outputs = (4, 512, 4) if tokens == 1 else (32, 128 if x.element_size() == 2 else 32, 16)
    m, k_pad = (1 if tokens == 1 else TOKENS), _power(active)
    shared_blocks, blocks = -(-shared_width // rows), -(-width // rows)
    groups = active if tokens == 1 else (routed if active else 0)
    with torch.cuda.device_of(x):
        kernels.up[(shared_blocks + groups * blocks,)](
            x, _or(chosen, x), _or(scale, x), _or(up, x), _or(bias, x), _or(shared_up, x), _or(shared_bias, x), neurons,
            tokens, hidden, width, shared_width, shared_blocks, blocks,
            K=active, K_PAD=k_pad, GATED=gated, BIASED=bias is not None or shared_bias is not None,
            SCALED=scale is not None, KIND=native.ACTIVATIONS[activation], M=m, N=rows, C=_columns(hidden, most),
            num_warps=4, num_stages=4,
        )  # fmt: skip
        kernels.down[(-(-hidden // outputs),)](
            neurons, _or(chosen, x), _or(down, x), _or(shared_down, x), y, tokens, hidden, width, shared_width, routed,
            K=active, K_PAD=k_pad, M=m, N=outputs, C=_columns(max(width if active else 1, shared_width), most),
            num_warps=4, num_stages=4,
        )  # fmt: skip
    return y


def _route(x: Tensor, weight: Tensor, active: int) -> tuple[Tensor, Tensor]:
    (tokens, hidden), routed = x.shape, len(weight)
    x, weight = x.contiguous(), weight.contiguous()
    scores = x.new_empty(tokens, routed, dtype=torch.float32)
    chosen = x.new_empty(tokens, active, dtype=torch.int64)
    pad = _power(routed)
    with torch.cuda.device_of(x):
        _kernels().route[(tokens,)](
            x, weight, scores, chosen, hidden,
            R=routed, K=active, R_PAD=pad, C=_columns(hidden, max(16, 8192 // pad)), num_warps=8,
        )  # fmt: skip
    return scores, chosen


torch.library.custom_op("factormix::gpu_decode", _decode, mutates_args=()).register_fake(
    lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format)
)
torch.library.custom_op("factormix::gpu_route", _route, mutates_args=()).register_fake(
    lambda x, weight, active: (
        x.new_empty(len(x), len(weight), dtype=torch.float32),
        x.new_empty(len(x), active, dtype=torch.int64),
    )
)


@functools.cache
def _kernels() -> ModuleType:
    """`decode_triton`, imported when first needed: Triton is not everywhere, and slow to import."""
    return importlib.import_module("factormix.experts.decode_triton")


def _ready(x: Tensor) -> bool:
    return (
        INSTALLED
        and x.device.type == DEVICE
        and x.dtype in DTYPES
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(DEVICE)
    )


def _power(count: int) -> int:
    """The least power of two that is not below `count`."""
    return 1 << max(count - 1, 0).bit_length()


def _columns(count: int, most: int) -> int:
    """How many columns a block reads at a time: a power of two, 16 at least."""
    return min(most, max(16, _power(count)))


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A kernel's argument must point somewhere, read or not."""
    return other if tensor is None else tensor
