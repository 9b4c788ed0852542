"""Int8 weights in the place of a SparseFFN's shared neurons or of its experts: for inference, on a CPU.

Symmetric, a scale for each output row, no calibration: w = scale * q, scale = max |row| / 127, so an element is off by
half a scale at most. Activations stay in the model's dtype, and sums run over q exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from factormix.experts import PackedExperts, run_experts

LEVELS = 127  # -127 to 127


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(..., M, N) in floating point -> (..., M, N) int8 and the rows' scales (..., M) float32."""
    weight = weight.detach().float()
    scale = weight.abs().amax(-1) / LEVELS  # (..., M)
    divisor = torch.where(scale > 0, scale, 1.0).unsqueeze(-1)  # (..., M, 1); a row of zeros stays one
    return (weight / divisor).round_().to(torch.int8), scale


class Int8Neurons(nn.Module):
    """R experts, or the shared neurons as one expert, with int8 weights.

    Parameters ``up`` (R, 2W or W, H) and ``down`` (R, H, W), int8, and ``up_bias`` (R, 2W or W) or None; buffers
    ``up_scale`` (R, 2W or W) and ``down_scale`` (R, H), float32 whatever the model is cast to.
    """

    up: Tensor
    down: Tensor
    up_scale: Tensor
    down_scale: Tensor

    def __init__(self, packed: PackedExperts) -> None:
        super().__init__()
        assert isinstance(packed.up, Tensor) and isinstance(packed.down, Tensor)
        self.activation, self.gated = packed.activation, packed.gated
        for name, weight in (("up", packed.up), ("down", packed.down)):
            numbers, scale = rounded(weight)
            self.register_parameter(name, nn.Parameter(numbers, requires_grad=False))
            self.register_buffer(f"{name}_scale", scale)
        bias = packed.up_bias
        self.up_bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def packed(self) -> PackedExperts:
        """The same weights as plain tensors; no copy."""
        return PackedExperts(
            self.up, self.down, self.up_bias, self.activation, self.gated, self.up_scale, self.down_scale
        )

    def forward(self, x: Tensor, chosen: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """x (T, H), chosen (T, K) or None for the shared neurons, scale (T, K) or None -> (T, H)."""
        if chosen is None:
            chosen = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)  # (T, 1)
        return run_experts(x, chosen, scale, self.packed())

    def neurons(self, x: Tensor) -> Tensor:
        """Post-activation neurons of the shared part, (T, H) -> (T, S * W)."""
        return self.packed().expert_neurons(0, x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What ``.to()`` and its like do; a scale goes to another device and no other dtype."""
        exact = {name: scale for name, scale in self._buffers.items() if scale is not None}
        super()._apply(fn, recurse)
        for name, scale in exact.items():
            self._buffers[name] = scale.to(self.down.device)
        return self
