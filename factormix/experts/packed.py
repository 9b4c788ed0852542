"""The packed weights of R routed experts, as transformers packs them, seen as plain tensors.

R experts of width W on hidden size H. An expert is one contiguous block in each tensor, so running it reads its own
rows and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
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
    """

    up: Tensor | tuple[Tensor, ...]
    down: Tensor | tuple[Tensor, ...]
    up_bias: Tensor | None
    activation: str
    gated: bool

    @property
    def act(self) -> Callable[[Tensor], Tensor]:
        """The activation function, (..., W) -> (..., W)."""
        return activation(self.activation)

    def lie_ready(self, x: Tensor) -> bool:
        """Whether a kernel can take the weights where they lie: plain tensors of x's device and dtype, contiguous."""
        return all(
            weight is None
            or (
                isinstance(weight, Tensor)
                and type(weight) in PLAIN
                and weight.dtype is x.dtype
                and weight.device == x.device
                and weight.is_contiguous()
            )
            for weight in (self.up, self.down, self.up_bias)
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
        return torch.nn.functional.linear(self.expert_neurons(expert, x), self.down[expert])  # (N, H)

    def expert_neurons(self, expert: int, x: Tensor) -> Tensor:
        """Post-activation neurons of one expert, (N, H) -> (N, W)."""
        bias = None if self.up_bias is None else self.up_bias[expert]
        return self.neurons(torch.nn.functional.linear(x, self.up[expert], bias))  # (N, W)


_CACHE: dict[str, Callable[[Tensor], Tensor]] = {}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """ACT2FN[name], made once: ACT2FN builds a new module at each look-up, too slow for every decoded token."""
    if name not in _CACHE:
        functional = {"silu": torch.nn.functional.silu, "relu": torch.nn.functional.relu}
        _CACHE[name] = functional.get(name) or ACT2FN[name]
    return _CACHE[name]
