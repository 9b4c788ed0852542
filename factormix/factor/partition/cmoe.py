"""CMoE (arXiv 2502.04416): activation rates and balanced clusters of activation patterns. A baseline.

    h_tj = act(g_j x_t) * (u_j x_t), x_t, g_j and u_j at unit length
    a_tj = 1 for the K_a neurons of largest |h_tj| at token t, else 0
    rate_j = mean over t of a_tj

The neurons of highest rate are shared. Of the others, the R of highest rate are the first centres; every neuron joins a
centre under a balanced assignment that minimises the distance of patterns a_j; the centres become their clusters'
means, and the neuron nearest to a centre represents the expert: the router asks what it would do (`NeuronRouter`). One
round of assignment, as released. The released code solves the assignment exactly (Jonker-Volgenant); here it is the
house's own, tested to come within a few percent of that.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from factormix.factor.activations import ActivationStats
from factormix.factor.partition.assignment import Assignment
from factormix.factor.partition.balanced import balanced_assignment
from factormix.nn import Layout

MARKED = 10  # K_a: neurons that count as active at a token, as released, whatever I is


def cmoe(stats: ActivationStats, layout: Layout, generator: torch.Generator) -> Assignment:
    """Shared neurons by activation rate; the others by balanced clusters of their patterns."""
    width = layout.width(stats.inner)
    marks = activation_marks(stats)  # (n, I)
    rate = marks.mean(0)  # (I,)
    shared, routed = stats.most_important(layout.shared * width, rate)
    if layout.routed == 0:
        return Assignment.without_experts(shared, routed, width)
    patterns = marks[:, routed]  # (n, N)
    first = rate[routed].argsort(descending=True, stable=True)[: layout.routed]  # (R,)
    owner = balanced_assignment(-distance(patterns[:, first], patterns))  # (N,)
    member = torch.nn.functional.one_hot(owner, layout.routed).to(patterns.dtype)  # (N, R)
    centres = patterns @ member / member.sum(0)  # (n, R)
    away = distance(centres, patterns).masked_fill(member.T == 0, torch.inf)  # (R, N)
    return Assignment.from_owner(shared, routed, owner, layout.routed, routed[away.argmin(1)])


def activation_marks(stats: ActivationStats, marked: int = MARKED) -> Tensor:
    """(n, I) float, a_tj at each token of the sample: `marked` ones a row (all of them in an FFN that is narrower)."""
    w = stats.weights
    x = normalize(stats.sample.to(w.up.device), dim=1)  # (n, H)
    h = x @ normalize(w.up.float(), dim=1).T  # (n, I)
    h = stats.act(h) if w.gate is None else stats.act(x @ normalize(w.gate.float(), dim=1).T) * h
    top = h.abs().topk(min(marked, h.shape[1]), dim=1).indices  # (n, K_a)
    return torch.zeros_like(h).scatter_(1, top, 1.0).cpu()


def distance(centres: Tensor, patterns: Tensor) -> Tensor:
    """Sum over tokens of |c_t - a_t|, c (n, R) in 0..1, a (n, N) 0 or 1 -> (R, N)."""
    return centres.sum(0)[:, None] + (1 - 2 * centres).T @ patterns
