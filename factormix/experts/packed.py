"""The packed weights of R routed experts, as transformers packs them, seen as plain tensors.

R experts of width W on hidden size H. An expert is one contiguous block in each tensor, so running it reads its own
rows and nothing else. Rows of int8 have a float32 scale each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)  # others may hold something else than they say: quantised ones do


@dataclass(frozen=True)
class PackedExperts:
    """Views of a module's own parameters; nothing here owns memory.

    Attributes:
        up: (R, 2W, H), gate rows first then up rows, when `gated`; else (R, W, H). Or its R matrices.
        down: (R, H, W). Or its R matrices.
        up_bias: (R, 2W) or (R, W), or None.
        activation: a key of transformers' ``ACT2FN``.
        gated: act(gate) * up rather than act(up).
        up_scale: of int8 weights, what each row of `up` is multiplied by: (R, 2W) or (R, W), float32; else None.
        down_scale: the same of `down`: (R, H).
    """

    up: Tensor | tuple[Tensor, ...]
    down: Tensor | tuple[Tensor, ...]
    up_bias: Tensor | None
    activation: str
    gated: bool
    up_scale: Tensor | None = None
    down_scale: Tensor | None = None

    @property
    def int8(self) -> bool:
        """Whether the weights are int8 with scales: for inference only."""
        return self.up_scale is not None

    @property
    def act(self) -> Callable[[Tensor], Tensor]:
        """The activation function, (..., W) -> (..., W)."""
        return activation(self.activation)

    def lie_ready(self, x: Tensor) -> bool:
        """Whether a kernel can take the weights where they lie: plain contiguous tensors of x's device, and of x's
        dtype unless they are int8."""
        kind = torch.int8 if self.int8 else x.dtype
        expected = [(self.up, kind), (self.down, kind), (self.up_bias, x.dtype)]
        expected += [(self.up_scale, torch.float32), (self.down_scale, torch.float32)]
        return all(
            weight is None
            or (
                isinstance(weight, Tensor)
                and type(weight) in PLAIN
                and weight.dtype is dtype
                and weight.device == x.device
                and weight.is_contiguous()
            )
            for weight, dtype in expected
        )

    def unstacked(self, dtype: torch.dtype) -> PackedExperts:
        """The same as R matrices, for training: each index into a stack has a backward as large as the stack."""
        assert isinstance(self.up, Tensor) and isinstance(self.down, Tensor)
        return replace(self, up=self.up.to(dtype).unbind(0), down=self.down.to(dtype).unbind(0))

    def neurons(self, projected: Tensor) -> Tensor:
        """Post-activation neurons from the up projection's output, (..., 2W or W) -> (..., W)."""
        if not self.gated:
            return self.act(projected)
        width = projected.shape[-1] // 2
        return self.act(projected[..., :width]) * projected[..., width:]  # (..., W)

    def run(self, expert: int, x: Tensor) -> Tensor:
        """E_i(x): one expert on every row of x, (N, H) -> (N, H). No output bias: the FFN adds that once."""
        scale = None if self.down_scale is None else self.down_scale[expert]
        return _linear(self.expert_neurons(expert, x), self.down[expert], scale, None)  # (N, H)

    def expert_neurons(self, expert: int, x: Tensor) -> Tensor:
        """Post-activation neurons of one expert, (N, H) -> (N, W)."""
        bias = None if self.up_bias is None else self.up_bias[expert]
        scale = None if self.up_scale is None else self.up_scale[expert]
        return self.neurons(_linear(x, self.up[expert], scale, bias))  # (N, W)


def _linear(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """x (N, H) times the rows of weight (M, H), each with its scale (M,) where they are int8 -> (N, M)."""
    if scale is None:
        return F.linear(x, weight, bias)
    y = (F.linear(x, weight.to(x.dtype)) * scale).to(x.dtype)  # (N, M); 8 bits are exact in any of our dtypes
    return y if bias is None else y + bias.to(y.dtype)


_CACHE: dict[str, Callable[[Tensor], Tensor]] = {}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """ACT2FN[name], made once: ACT2FN builds a new module at each look-up, too slow for every decoded token."""
    if name not in _CACHE:
        functional = {"silu": torch.nn.functional.silu, "relu": torch.nn.functional.relu}
        _CACHE[name] = functional.get(name) or ACT2FN[name]
    return _CACHE[name]
