"""Router: one linear layer from the FFN's input to a score for each expert, and the top K of them.

FactorLLM, section 3.2. Linear and without bias, so that stock MoE containers can hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Router(nn.Module):
    """Scores R experts for each token and names the K best.

    The scores are summed in float64 where the device has a fast enough one (CPU) and rounded to float32: a matrix
    product adds in another order when the batch has another size, and in float32 that alone flips near-ties. So equal
    rows get equal scores, hence the same experts, in any batch.
    """

    def __init__(self, hidden: int, routed: int, active: int) -> None:
        super().__init__()
        self.active = active
        self.weight = nn.Parameter(torch.empty(routed, hidden))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (T, H) -> scores z (T, R) float32 and chosen experts (T, K) int64, best first."""
        exact = torch.float64 if x.device.type == "cpu" else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            scores = nn.functional.linear(x.to(exact), self.weight.to(exact)).float()  # (T, R)
        return scores, scores.topk(self.active, dim=-1).indices  # (T, R), (T, K)

    def extra_repr(self) -> str:
        return f"hidden={self.weight.shape[1]}, routed={self.weight.shape[0]}, active={self.active}"
