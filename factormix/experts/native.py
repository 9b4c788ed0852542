"""The C++ operator for decoding on a CPU (`decode.cpp`): built on first use, kept in the cache.

Without a compiler, or with FACTORMIX_NATIVE=0, everything runs on PyTorch's own operators, a little slower at a few
tokens; one warning says so. The file in the cache is named after the source, the compiler and the machine's kind.
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
from pathlib import Path

import torch
from torch import Tensor

from factormix.data.assets import cache_directory
from factormix.experts.packed import PackedExperts
from factormix.run.directory import atomic_path
from factormix.run.errors import FactorMixError

SOURCE = Path(__file__).with_name("decode.cpp")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-Wno-psabi", *(["-fopenmp"] if sys.platform == "linux" else []))
TOKENS = 4  # at most; more tokens amortise PyTorch's cost a call
ACTIVATIONS = {"silu": 0, "swish": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "gelu_new": 2, "relu": 3}
DTYPES = (torch.float32, torch.bfloat16)


class _Call(ctypes.Structure):
    """`struct Call` of decode.cpp."""

    _fields_ = [
        *[
            (name, ctypes.c_void_p)
            for name in "x chosen scale up down bias shared_up shared_down shared_bias y".split()
        ],
        *[
            (name, ctypes.c_int64)
            for name in "tokens hidden routed active width shared_width bf16 kind gated threads".split()
        ],
    ]


def serves(x: Tensor, parts: Sequence[PackedExperts]) -> bool:
    """Whether `decode` computes this: a few tokens on a CPU, no gradient, autocast or tracing; else PyTorch does."""
    return (
        0 < len(x) <= TOKENS
        and x.dtype in DTYPES
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and all(part.activation in ACTIVATIONS for part in parts)
        and all(_lies_ready(weight, x) for part in parts for weight in (part.up, part.down, part.up_bias))
        and library() is not None
    )


def decode(
    x: Tensor, chosen: Tensor | None, scale: Tensor | None, experts: PackedExperts | None, shared: PackedExperts | None
) -> Tensor:
    """Shared neurons and chosen experts of a few tokens.

    Args:
        x: (T, H), T at most `TOKENS`.
        chosen: (T, K) int64, distinct in a row; None without experts.
        scale: (T, K) or None for 1.
        experts: of R experts, or None.
        shared: of one "expert", the shared neurons, or None. Either has the activation.

    Returns:
        (T, H) in x's dtype; summed in float32.

    Raises:
        FactorMixError: an expert that does not exist, or twice in a row of `chosen`.
    """
    some = shared or experts
    built = library()
    assert some is not None and built is not None
    single = x.float().contiguous()  # (T, H)
    y = torch.empty_like(single)  # (T, H)
    call = _Call(
        x=single.data_ptr(), y=y.data_ptr(), tokens=x.shape[0], hidden=x.shape[1], bf16=x.dtype == torch.bfloat16,
        kind=ACTIVATIONS[some.activation], gated=some.gated, threads=torch.get_num_threads(),
    )  # fmt: skip
    if shared is not None:
        call.shared_up, call.shared_down, call.shared_bias = _pointers(shared)
        call.shared_width = shared.down.shape[2]  # type: ignore[union-attr]
    if experts is not None and chosen is not None:
        call.up, call.down, call.bias = _pointers(experts)
        call.routed, _, call.width = experts.down.shape  # type: ignore[union-attr]
        chosen, scale = chosen.contiguous(), None if scale is None else scale.float().contiguous()
        call.chosen, call.scale, call.active = chosen.data_ptr(), _pointer(scale), chosen.shape[1]
    if built.factormix_decode(ctypes.byref(call)):
        raise FactorMixError(f"experts {chosen.tolist()} of {call.routed}: each must exist, once a token.")  # type: ignore[union-attr]
    return y.to(x.dtype)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The operator, built at the first call; None where it cannot be or is switched off."""
    if os.environ.get("FACTORMIX_NATIVE") == "0":
        return None
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        warnings.warn("no C++ compiler: decoding on a CPU uses PyTorch's operators, which are slower.", stacklevel=2)
        return None
    try:
        built = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        warnings.warn(f"decode.cpp was not built, PyTorch's operators are used: {str(said)[-500:]}", stacklevel=2)
        return None
    built.factormix_decode.restype = ctypes.c_int64
    return built


def _built(compiler: str) -> Path:
    """The shared library, compiled unless the cache has it."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256("\n".join([SOURCE.read_text("utf-8"), version, platform.machine(), *FLAGS]).encode())
    file = cache_directory() / "native" / f"decode-{key.hexdigest()[:16]}.so"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as out:
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(out)]
            subprocess.run(command, capture_output=True, text=True, check=True)
    return file


def _lies_ready(weight: Tensor | tuple[Tensor, ...] | None, x: Tensor) -> bool:
    return weight is None or (
        isinstance(weight, Tensor)
        and weight.device.type == x.device.type == "cpu"
        and weight.dtype == x.dtype
        and weight.is_contiguous()
    )


def _pointers(parts: PackedExperts) -> tuple[int | None, int | None, int | None]:
    return _pointer(parts.up), _pointer(parts.down), _pointer(parts.up_bias)


def _pointer(tensor: Tensor | tuple[Tensor, ...] | None) -> int | None:
    return tensor.data_ptr() if isinstance(tensor, Tensor) else None
