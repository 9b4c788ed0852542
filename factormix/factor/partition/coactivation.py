"""Activation clusters: neurons that matter for the same tokens share an expert.

The energy of neuron j at token t is e_tj = a_tj^2 |d_j|^2: how much it adds to the FFN's output. A split captures

    captured = sum_t  sum over the K experts with most energy at t  of their energy  /  all energy

Balanced k-means on the energies' patterns gives a start; then, in turn, each token picks its K best experts and each
neuron moves to the expert that was picked by the tokens it matters for, as long as the captured share grows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from factormix.factor.activations import ActivationStats
from factormix.factor.partition.assignment import Assignment
from factormix.factor.partition.balanced import balanced_assignment, balanced_kmeans
from factormix.nn import Layout

ROUNDS = 8


def coactivation(stats: ActivationStats, layout: Layout, generator: torch.Generator) -> Assignment:
    """Shared neurons by energy; the others by the captured share of energy."""
    width = layout.width(stats.inner)
    shared, routed = stats.most_important(layout.shared * width)
    if layout.routed == 0:
        return Assignment.without_experts(shared, routed, width)
    energy = stats.sampled_energy()[:, routed]  # (n, N)
    patterns = (energy / energy.mean(0).clamp_min(1e-30)).sqrt()  # (n, N)
    owner = balanced_kmeans(patterns.T, layout.routed, generator)  # (N,)
    best, picked = captured(energy, owner, layout)
    for _ in range(ROUNDS):
        worth = picked.T @ energy  # (R, N) energy of each neuron at the tokens that picked each expert
        moved = balanced_assignment(worth)
        share, picked = captured(energy, moved, layout)
        if share <= best:
            break
        best, owner = share, moved
    return Assignment.from_owner(shared, routed, owner, layout.routed)


def captured(energy: Tensor, owner: Tensor, layout: Layout) -> tuple[float, Tensor]:
    """Share of the energy (n, N) that each token's K best experts hold, and which they are, (n, R) 0/1."""
    member = torch.nn.functional.one_hot(owner, layout.routed).to(energy.dtype)  # (N, R)
    by_expert = energy @ member  # (n, R)
    top = by_expert.topk(layout.active, dim=1)  # (n, K)
    picked = torch.zeros_like(by_expert).scatter_(1, top.indices, 1.0)  # (n, R)
    return float(top.values.sum() / energy.sum().clamp_min(1e-30)), picked
