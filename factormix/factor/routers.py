"""The routers of the methods that FactorMix is compared with, fitted as their papers do.

MoEfication's (arXiv 2110.01786, section 3.3, "MLP"): two layers learn the sum of positive activations in each expert,
scaled to 0..1, by cross-entropy. The first layer starts at the experts' mean input rows, the second at the identity, as
released. Two things differ. The scale is each token's own largest sum: a few massive tokens would press the others to
0. And in gated FFNs, which the paper has not and whose neurons prefer no sign, |a| stands for a's positive part.

CMoE's needs no fit: `assemble` writes the representative neurons' rows into it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, normalize

from factormix.nn import MLPRouter, SparseFFN

EPOCHS = 30  # as released, as are the two below
BATCH = 512
RATE = 0.01


def fit_mlp_router(ffn: SparseFFN, x: Tensor, generator: torch.Generator) -> float:
    """Fit the router of `ffn` on x (T, H) in place; returns the last batch's loss, which is NaN where it went wrong."""
    router = ffn.router
    assert isinstance(router, MLPRouter)
    target = expert_activity(ffn, x)  # (T, R)
    target /= target.amax(1, keepdim=True).clamp_min(1e-30)
    first = input_centres(ffn).requires_grad_()  # (R, H)
    second = torch.eye(len(first), device=x.device, requires_grad=True)  # (R, R)
    optimiser = torch.optim.Adam([first, second], lr=RATE)
    unit = normalize(x.float(), dim=-1)  # (T, H)
    loss = torch.zeros(())
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x), generator=generator).to(x.device).split(BATCH):
            with torch.enable_grad():
                scores = (unit[rows] @ first.T).tanh() @ second.T  # (B, R)
                loss = binary_cross_entropy_with_logits(scores, target[rows])
                loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    with torch.no_grad():
        router.weight.copy_(first)
        router.second.copy_(second)
    return float(loss.detach())


@torch.no_grad()
def expert_activity(ffn: SparseFFN, x: Tensor) -> Tensor:
    """Sum of the neurons' positive activations (gated: of their sizes) in each expert: x (T, H) -> (T, R) float32."""
    assert ffn.experts is not None
    packed = ffn.experts.packed()
    sums = []
    for i in range(len(packed.up)):
        neurons = packed.expert_neurons(i, x).float()  # (T, W)
        sums.append((neurons.abs() if packed.gated else neurons.clamp_min(0)).sum(1))
    return torch.stack(sums, dim=1)


@torch.no_grad()
def input_centres(ffn: SparseFFN) -> Tensor:
    """Mean of each expert's input rows (of the gate, where there is one) at unit length: (R, H) float32."""
    assert ffn.experts is not None
    up: Tensor = getattr(ffn.experts, ffn.experts.up_name)  # (R, W or 2W, H), gate rows first
    rows = up[:, : ffn.spec.width].float()  # (R, W, H)
    return normalize(rows, dim=-1).mean(1)
