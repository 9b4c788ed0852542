"""MoEfication (arXiv 2110.01786): weight clusters. A baseline.

Section 3.2, "parameter clustering split": the rows of the FFN's input projection are the points of a balanced k-means,
unit length first; neurons with near rows fire together. There are no shared neurons. The paper's FFNs are plain (ReLU);
of a gated one the point is the joined gate and up row, each at unit length.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from factormix.factor.activations import ActivationStats
from factormix.factor.partition.assignment import Assignment
from factormix.factor.partition.balanced import balanced_kmeans
from factormix.nn import Layout

ROUNDS = 20  # of the k-means, as released


def moefication(stats: ActivationStats, layout: Layout, generator: torch.Generator) -> Assignment:
    """All neurons by balanced k-means on the rows of the input projection."""
    owner = balanced_kmeans(input_rows(stats), layout.routed, generator, ROUNDS)  # (I,)
    nobody = torch.empty(0, dtype=torch.int64)
    return Assignment.from_owner(nobody, torch.arange(stats.inner), owner, layout.routed)


def input_rows(stats: ActivationStats) -> Tensor:
    """(I, H), or (I, 2H) of a gated FFN: what is clustered."""
    parts = [part for part in (stats.weights.gate, stats.weights.up) if part is not None]
    return torch.cat([normalize(part.float().cpu(), dim=1) for part in parts], dim=1)
