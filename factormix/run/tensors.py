"""Tensors in safetensors files, the only kind that is loaded from outside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from factormix.run.errors import FactorMixError


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file as readable as any new file; safetensors alone makes it readable by the owner only."""
    file.touch()
    mode = file.stat().st_mode
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, file, metadata={"format": "pt"})
    file.chmod(mode)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """A safetensors file, on the CPU.

    Raises:
        FactorMixError: absent or damaged.
    """
    if not file.is_file():
        raise FactorMixError(f"{str(file)!r} is missing; the directory is incomplete. Copy or make it anew.")
    try:
        return load_file(file)
    except Exception as error:  # safetensors' own class
        raise FactorMixError(f"{str(file)!r} is truncated or no safetensors file ({error}). Copy it again.") from error
