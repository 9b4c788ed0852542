"""Static pruning, the baselines that routing must beat: which neurons stay for all tokens, the others are dropped.

    wanda   sum_t a_tj^2 |d_j|^2             Wanda's |W| |X| (arXiv 2306.11695), squared, over a neuron's output weights
    flap    sum_t (a_tj - mean_j)^2 |d_j|^2  FLAP's fluctuation (arXiv 2312.11983), and its bias compensation:
                                             b += sum over the dropped j of mean_j d_j

Both within one FFN: every FFN keeps the same number. (FLAP also moves budget between layers.)
"""

from __future__ import annotations

import torch

from factormix.factor.activations import ActivationStats
from factormix.factor.partition.assignment import Assignment
from factormix.nn import Layout


def wanda(stats: ActivationStats, layout: Layout, generator: torch.Generator) -> Assignment:
    """Keep the neurons of most energy, massive tokens counted as they are."""
    width = layout.width(stats.inner)
    score = stats.mean_square * stats.down_squares()  # (I,)
    return Assignment.without_experts(*stats.most_important(layout.shared * width, score), width)


def flap(stats: ActivationStats, layout: Layout, generator: torch.Generator) -> Assignment:
    """Keep the neurons that fluctuate most; the mean of the others goes into the output bias."""
    width = layout.width(stats.inner)
    score = (stats.mean_square - stats.mean.square()) * stats.down_squares()  # (I,)
    kept, dropped = stats.most_important(layout.shared * width, score)
    lost = stats.mean[dropped] @ stats.weights.down[dropped.to(stats.weights.down.device)].float().cpu()  # (H,)
    return Assignment.without_experts(kept, dropped, width, lost)
