"""The C++ operator for decoding on a CPU (`decode.cpp`): built on first use, kept in the cache.

Without a compiler, or with FACTORMIX_NATIVE=0, everything runs on PyTorch's own operators, a little slower at a few
tokens; one warning says so. The file in the cache is named after the source, torch and the compiler.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import warnings
from pathlib import Path

import torch
from torch import Tensor

from factormix.data.assets import cache_directory
from factormix.experts.packed import PackedExperts
from factormix.run.directory import atomic_path
from factormix.run.progress import say

SOURCE = Path(__file__).with_name("decode.cpp")
TOKENS = 4  # at most; more tokens amortise PyTorch's cost a call
ACTIVATIONS = {"silu": 0, "swish": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "gelu_new": 2, "relu": 3}
DTYPES = (torch.float32, torch.bfloat16)


def serves(x: Tensor, parts: PackedExperts) -> bool:
    """Whether `decode` computes this: a few tokens on a CPU, no gradient, no autocast, no tracing; else PyTorch does."""
    return (
        0 < len(x) <= TOKENS
        and x.dtype in DTYPES
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and parts.activation in ACTIVATIONS
        and all(_lies_ready(weight, x) for weight in (parts.up, parts.down, parts.up_bias))
        and available()
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
    """
    parts = shared or experts
    assert parts is not None
    found: Tensor = torch.ops.factormix_native.decode(
        x, chosen, scale, *_tensors(experts), *_first(shared), ACTIVATIONS[parts.activation], parts.gated
    )
    return found


@functools.cache
def available() -> bool:
    """True once the operator is loaded; builds it at the first call."""
    if os.environ.get("FACTORMIX_NATIVE") == "0":
        return False
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        warnings.warn("no C++ compiler: decoding on a CPU uses PyTorch's operators, which are slower.", stacklevel=2)
        return False
    try:
        torch.ops.load_library(str(_built(compiler)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        warnings.warn(f"decode.cpp was not built, PyTorch's operators are used: {str(said)[-500:]}", stacklevel=2)
        return False
    return True


def _built(compiler: str) -> Path:
    """The shared library, compiled unless the cache has it."""
    from torch.utils.cpp_extension import include_paths, library_paths

    flags = [
        "-O3",
        "-std=c++20",
        "-fPIC",
        "-shared",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
    ]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256(
        "\n".join([SOURCE.read_text(), torch.__version__, version, platform.machine(), *flags]).encode()
    )
    file = cache_directory() / "native" / f"decode-{key.hexdigest()[:16]}.so"
    if not file.is_file():
        say("compiling the decoding operator (once, about 20 s)")
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as out:
            command = [compiler, *flags, str(SOURCE), "-o", str(out)]
            command += [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
            subprocess.run([*command, "-ltorch_cpu", "-lc10"], capture_output=True, text=True, check=True)
    return file


def _lies_ready(weight: Tensor | tuple[Tensor, ...] | None, x: Tensor) -> bool:
    return weight is None or (
        isinstance(weight, Tensor)
        and weight.device.type == x.device.type == "cpu"
        and weight.dtype == x.dtype
        and weight.is_contiguous()
    )


def _tensors(parts: PackedExperts | None) -> tuple[object, object, object]:
    return (None, None, None) if parts is None else (parts.up, parts.down, parts.up_bias)


def _first(parts: PackedExperts | None) -> tuple[object, ...]:
    return tuple(None if t is None else t[0] for t in _tensors(parts))  # type: ignore[index]
