"""Sizes of this room's tiny models, and an FFN that declares idle experts as `SparseFFN` does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOCAB, HIDDEN, INNER, LAYERS, HEADS = 97, 16, 48, 2, 2


class HalfIdle(nn.Module):
    """A gated FFN of which half the width is shared and K = 1 of R = 4 experts runs, as `SparseFFN` declares itself."""

    def __init__(self) -> None:
        super().__init__()
        width = INNER // 8
        self.shared = nn.ModuleList([nn.Linear(HIDDEN, INNER // 2, bias=False) for _ in range(3)])
        self.experts = nn.ParameterDict(
            {
                "gate_up_proj": nn.Parameter(torch.randn(4, 2 * width, HIDDEN) * 0.1),
                "down_proj": nn.Parameter(torch.randn(4, HIDDEN, width) * 0.1),
            }
        )

    def active_parameters(self) -> int:
        """The shared half and one expert in four."""
        return 3 * HIDDEN * INNER // 2 + 3 * HIDDEN * INNER // 8

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, H) -> (…, H)"""
        gate, up = (hidden @ self.experts["gate_up_proj"][0].T).chunk(2, -1)  # (…, W) each
        return (gate.sigmoid() * up) @ self.experts["down_proj"][0].T
