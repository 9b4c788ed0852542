"""The size of a tensor's numbers, in which learning rates and fresh adapters are measured."""

from __future__ import annotations

from torch import Tensor


def rms(x: Tensor) -> float:
    """Root mean square of all elements."""
    return float(x.detach().float().square().mean().sqrt())
