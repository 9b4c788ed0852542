"""Weight clusters: neurons with similar weights share an expert.

A neuron is the joined vector of its gate, up and down weights, so that the three stay together (the released code
of FactorLLM clusters each matrix by itself, which breaks the neurons).
"""

from __future__ import annotations

import torch

from factormix.factor.activations import ActivationStats
from factormix.factor.partition.assignment import Assignment
from factormix.factor.partition.balanced import balanced_kmeans
from factormix.nn import Layout


def kmeans(stats: ActivationStats, layout: Layout, generator: torch.Generator) -> Assignment:
    """Shared neurons by energy; the others by balanced k-means on joined weights, each part to unit norm first."""
    width = layout.width(stats.inner)
    shared, routed = stats.most_important(layout.shared * width)
    if layout.routed == 0:
        return Assignment.without_experts(shared, routed, width)
    w = stats.weights
    parts = [part for part in (w.gate, w.up, w.down) if part is not None]
    points = torch.cat([torch.nn.functional.normalize(p.float().cpu(), dim=1) for p in parts], dim=1)  # (I, 2H or 3H)
    owner = balanced_kmeans(points[routed], layout.routed, generator)
    return Assignment.from_owner(shared, routed, owner, layout.routed)
