"""The C++ operator for CPUs (`ffn.cpp` and the headers beside it): a whole sparse FFN in one call, built on first use.

Without a compiler, or with FACTORMIX_NATIVE=0, everything runs on PyTorch's own operators, slower; one warning says so.
The file in the cache is named after the source, the compiler and the machine's kind.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from factormix.experts.packed import PLAIN, PackedExperts
from factormix.run.cache import cache_directory
from factormix.run.directory import atomic_path
from factormix.run.errors import FactorMixError

SOURCES = (Path(__file__).with_name("ffn.cpp"), *sorted(Path(__file__).parent.glob("*.h")))
FLAGS = ("-O2", "-std=c++17", "-fPIC", "-shared", "-Wno-psabi", *(["-fopenmp"] if sys.platform == "linux" else []))
AVX2 = 1  # of `kLevels` in ffn.cpp
FEW = 16  # tokens that it serves below AVX2, where PyTorch's products of larger matrices are faster than ours
ACTIVATIONS = {"silu": 0, "swish": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "gelu_new": 2, "relu": 3}
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
GIVEN, CONSTANT, SIGMOID = 0, 1, 2  # `enum Gate`: where the weights of the chosen experts come from


class _Call(ctypes.Structure):
    """`struct Call` of ffn.cpp."""

    _fields_ = [
        *[
            (name, ctypes.c_void_p)
            for name in (
                "x y router scores chosen weights up down up_bias shared_up shared_down shared_up_bias "
                "up_scale down_scale shared_up_scale shared_down_scale"
            ).split()
        ],
        *[
            (name, ctypes.c_int64)
            for name in (
                "tokens hidden routed active width shared_width bf16 int8 router_bf16 kind gated gate threads"
            ).split()
        ],
        ("factor", ctypes.c_double),
    ]


def takes(x: Tensor) -> bool:
    """Whether the operator may run on x, (..., H): on a CPU, without gradient, autocast, tracing or a dispatch mode
    (which counts or fakes PyTorch's operators); else PyTorch does."""
    return _plain(x) and not torch.is_autocast_enabled("cpu") and 0 < x.numel() <= most_tokens() * x.shape[-1]


def serves(x: Tensor, parts: Sequence[PackedExperts]) -> bool:
    """Whether `decode` and `forward` compute these parts of x."""
    return takes(x) and reads_parts(x, parts)


def reads_parts(x: Tensor, parts: Sequence[PackedExperts]) -> bool:
    """Whether the operator can take weights of this form: activations it knows, all int8 or all of x's dtype."""
    return len({part.int8 for part in parts}) == 1 and all(
        part.activation in ACTIVATIONS and part.lie_ready(x) for part in parts
    )


def routes(x: Tensor, router: Tensor) -> bool:
    """Whether `route`, and the router of `forward`, compute this; under autocast too, which does not reach scores."""
    return _plain(x) and reads(router) and library() is not None


def reads(router: Tensor) -> bool:
    """Whether the operator can take a router's weight where it lies."""
    return type(router) in PLAIN and router.is_cpu and router.dtype in DTYPES and router.is_contiguous()


def _plain(x: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and x.is_cpu
        and x.dtype in DTYPES
        and not torch.is_grad_enabled()
        and not torch._C._len_torch_dispatch_stack()
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """A sparse FFN as the operator wants it: where its weights lie, not the weights."""

    call: _Call
    dtype: torch.dtype  # of the tokens


def plan(
    dtype: torch.dtype,
    experts: PackedExperts | None,
    shared: PackedExperts | None,
    router: Tensor | None = None,
    active: int = 0,
    gate: int = GIVEN,
    factor: float = 1.0,
) -> Plan:
    """Look up what does not change from call to call, of parts that the operator serves.

    Args:
        dtype: of the tokens, and of the weights unless these are int8.
        experts: of R experts, or None.
        shared: of one "expert", the shared neurons, or None. Either has the activation; both are int8 or neither.
        router: (R, H), float32 or bfloat16, contiguous; or None where the choice is given.
        active: K, with a router.
        gate: with a router, CONSTANT: outputs times `factor`; or SIGMOID: times the score's sigmoid.
        factor: a number.
    """
    some = shared or experts
    assert some is not None and isinstance(some.up, Tensor)
    call = _Call(kind=ACTIVATIONS[some.activation], gated=some.gated)
    call.hidden, call.bf16, call.int8 = some.up.shape[2], DTYPES[dtype], some.int8
    if shared is not None:
        call.shared_up, call.shared_down, call.shared_up_bias = _pointers(shared.up, shared.down, shared.up_bias)
        call.shared_up_scale, call.shared_down_scale = _pointers(shared.up_scale, shared.down_scale)
        call.shared_width = shared.down.shape[2]  # type: ignore[union-attr]
    if experts is not None:
        call.up, call.down, call.up_bias = _pointers(experts.up, experts.down, experts.up_bias)
        call.up_scale, call.down_scale = _pointers(experts.up_scale, experts.down_scale)
        call.routed, _, call.width = experts.down.shape  # type: ignore[union-attr]
    if router is not None:
        call.router, call.router_bf16 = router.data_ptr(), DTYPES[router.dtype]
        call.active, call.gate, call.factor = active, gate, factor
    return Plan(call, dtype)


def forward(found: Plan, x: Tensor) -> Tensor:
    """Router, shared neurons and chosen experts: all of a sparse FFN but its output bias.

    Args:
        found: with a router, or without experts.
        x: (..., H), of the plan's dtype.

    Returns:
        (..., H) in x's dtype; summed in float32. Scores are summed in float64, each in one order whatever the batch.
    """
    call, y, kept = _started(found, x)
    library().factormix_ffn(ctypes.byref(call))  # type: ignore[union-attr]
    del kept
    return y


def decode(
    x: Tensor, chosen: Tensor | None, scale: Tensor | None, experts: PackedExperts | None, shared: PackedExperts | None
) -> Tensor:
    """Shared neurons and chosen experts.

    Args:
        x: (T, H).
        chosen: (T, K) int64, distinct in a row; None without experts.
        scale: (T, K) or None for 1.
        experts: of R experts, or None.
        shared: of one "expert", the shared neurons, or None.

    Returns:
        (T, H) in x's dtype; summed in float32.

    Raises:
        FactorMixError: an expert that does not exist, or twice in a row of `chosen`.
    """
    call, y, kept = _started(plan(x.dtype, experts, shared), x)
    if experts is not None and chosen is not None:
        chosen, scale = chosen.contiguous(), None if scale is None else scale.float().contiguous()
        call.chosen, call.weights, call.active = chosen.data_ptr(), _pointer(scale), chosen.shape[1]
    if library().factormix_ffn(ctypes.byref(call)):  # type: ignore[union-attr]
        raise FactorMixError(f"experts {chosen.tolist()} of {call.routed}: each must exist, once a token.")  # type: ignore[union-attr]
    del kept
    return y


def route(x: Tensor, router: Tensor, active: int) -> tuple[Tensor, Tensor]:
    """Scores and choices alone: x (T, H), router (R, H) -> (T, R) float32 and (T, K) int64, best first."""
    x = x.contiguous()
    scores = torch.empty((len(x), len(router)), dtype=torch.float32)  # (T, R)
    chosen = torch.empty((len(x), active), dtype=torch.int64)  # (T, K)
    call = _Call(
        x=x.data_ptr(), router=router.data_ptr(), scores=scores.data_ptr(), chosen=chosen.data_ptr(), tokens=len(x),
        hidden=x.shape[1], routed=len(router), active=active, bf16=x.dtype == torch.bfloat16,
        router_bf16=router.dtype == torch.bfloat16, threads=torch.get_num_threads(),
    )  # fmt: skip
    library().factormix_ffn(ctypes.byref(call))  # type: ignore[union-attr]
    return scores, chosen


def _started(found: Plan, x: Tensor) -> tuple[_Call, Tensor, Tensor]:
    """The arguments of a call; the output; and the input, to be kept until the call is over."""
    x = x.contiguous()  # (..., H)
    y = torch.empty_like(x)  # (..., H)
    call = _Call.from_buffer_copy(found.call)
    call.x, call.y, call.threads = x.data_ptr(), y.data_ptr(), torch.get_num_threads()
    call.tokens = x.numel() // call.hidden
    return call, y, x


@functools.cache
def most_tokens() -> int:
    """Tokens that a call serves at most; 0 where there is no operator."""
    built = library()
    if built is None:
        return 0
    return sys.maxsize if built.factormix_level(-1) >= AVX2 else FEW


@functools.cache
def library() -> ctypes.CDLL | None:
    """The operator, built at the first call; None where it cannot be or is switched off."""
    if os.environ.get("FACTORMIX_NATIVE") == "0":
        return None
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        warnings.warn("no C++ compiler: a CPU runs experts by PyTorch's operators, which are slower.", stacklevel=2)
        return None
    try:
        built = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        warnings.warn(f"ffn.cpp was not built, PyTorch's operators are used: {str(said)[-500:]}", stacklevel=2)
        return None
    built.factormix_ffn.restype = built.factormix_level.restype = ctypes.c_int64
    built.factormix_level.argtypes = [ctypes.c_int64]
    return built


def _built(compiler: str) -> Path:
    """The shared library, compiled unless the cache has it."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    sources = [source.read_text("utf-8") for source in SOURCES]
    key = hashlib.sha256("\n".join([*sources, version, platform.machine(), *FLAGS]).encode())
    file = cache_directory() / "native" / f"ffn-{key.hexdigest()[:16]}.so"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as out:
            command = [compiler, *FLAGS, str(SOURCES[0]), "-o", str(out)]
            subprocess.run(command, capture_output=True, text=True, check=True)
    return file


def _pointers(*tensors: Tensor | tuple[Tensor, ...] | None) -> list[int | None]:
    return [_pointer(tensor) for tensor in tensors]


def _pointer(tensor: Tensor | tuple[Tensor, ...] | None) -> int | None:
    return tensor.data_ptr() if isinstance(tensor, Tensor) else None
