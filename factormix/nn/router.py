"""Router: from the FFN's input to a score for each expert, and the top K of them.

FactorLLM, section 3.2. Three kinds; the first is the default, the others are those of the methods it is compared with:

    linear   z = W x                          without bias, so that stock MoE containers can hold it
    mlp      z = V tanh(W x / |x|)            MoEfication (arXiv 2110.01786), which reads normalised inputs
    neuron   z = |act(G x) * (U x)|           CMoE (arXiv 2502.04416): what one neuron of each expert does;
             z = |act(U x)| where FFNs are plain
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from factormix.experts import gpu, native

RouterKind = Literal["linear", "mlp", "neuron"]


class Router(nn.Module):
    """Scores R experts for each token and names the K best. This one is linear.

    The scores are summed in float64 where the device has a fast enough one (CPU) and rounded to float32: a matrix
    product adds in another order when the batch has another size, and in float32 that alone flips near-ties. So equal
    rows get equal scores, hence the same experts, in any batch; of experts with equal scores the first is chosen. On a
    GPU, a kernel of our own does the same in float32.
    """

    def __init__(self, hidden: int, routed: int, active: int) -> None:
        super().__init__()
        self.active = active
        self.weight = nn.Parameter(torch.empty(routed, hidden))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (T, H) -> scores z (T, R) float32 and chosen experts (T, K) int64, best first."""
        if type(self) is Router:
            if gpu.routes(x):
                return gpu.route(x, self.weight, self.active)
            if native.routes(x, self.weight):
                return native.route(x, self.weight, self.active)
        exact = torch.float64 if x.device.type == "cpu" else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            scores = self.scores(x.to(exact)).float()  # (T, R)
        order = scores.sort(dim=-1, descending=True, stable=True).indices  # (T, R); topk leaves ties to chance
        return scores, order[:, : self.active]  # (T, R), (T, K)

    def scores(self, x: Tensor) -> Tensor:
        """x (T, H) -> z (T, R), in the dtype of x."""
        return nn.functional.linear(x, self.weight.to(x.dtype))

    def extra_repr(self) -> str:
        return f"hidden={self.weight.shape[1]}, routed={self.weight.shape[0]}, active={self.active}"


class MLPRouter(Router):
    """MoEfication's: two layers with tanh between, R wide. `weight` (R, H) is W, `second` (R, R) is V."""

    def __init__(self, hidden: int, routed: int, active: int) -> None:
        super().__init__(hidden, routed, active)
        self.second = nn.Parameter(torch.empty(routed, routed))

    def scores(self, x: Tensor) -> Tensor:
        """x (T, H) -> z (T, R), in the dtype of x."""
        inner = super().scores(nn.functional.normalize(x, dim=-1)).tanh()  # (T, R)
        return nn.functional.linear(inner, self.second.to(x.dtype))


class NeuronRouter(Router):
    """CMoE's: `weight` (R, H) is U, `gate` (R, H) is G, rows of one neuron an expert at unit length."""

    def __init__(self, hidden: int, routed: int, active: int, activation: str, gated: bool) -> None:
        super().__init__(hidden, routed, active)
        self.act = ACT2FN[activation]
        self.gate = nn.Parameter(torch.empty(routed, hidden)) if gated else None

    def scores(self, x: Tensor) -> Tensor:
        """x (T, H) -> z (T, R), in the dtype of x."""
        up = super().scores(x)  # (T, R)
        if self.gate is None:
            return self.act(up).abs()  # type: ignore[no-any-return]
        return (self.act(nn.functional.linear(x, self.gate.to(x.dtype))) * up).abs()  # type: ignore[no-any-return]


def make_router(kind: RouterKind, hidden: int, routed: int, active: int, activation: str, gated: bool) -> Router:
    """A router of a kind, its weights not set."""
    if kind == "mlp":
        return MLPRouter(hidden, routed, active)
    if kind == "neuron":
        return NeuronRouter(hidden, routed, active, activation, gated)
    return Router(hidden, routed, active)
