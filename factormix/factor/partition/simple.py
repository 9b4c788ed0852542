"""Contiguous slices and random slices: FactorLLM's own choices, and the baselines for the others."""

from __future__ import annotations

import torch

from factormix.factor.activations import ActivationStats
from factormix.factor.partition.assignment import Assignment
from factormix.nn import Layout


def contiguous(stats: ActivationStats, layout: Layout, generator: torch.Generator) -> Assignment:
    """The neurons in the order the model has them; the first S slices are shared."""
    return _cut(torch.arange(stats.inner), layout)


def random_split(stats: ActivationStats, layout: Layout, generator: torch.Generator) -> Assignment:
    """A random permutation, then equal division (FactorLLM section 3.1)."""
    return _cut(torch.randperm(stats.inner, generator=generator), layout)


def _cut(order: torch.Tensor, layout: Layout) -> Assignment:
    width = layout.width(len(order))
    shared = layout.shared * width
    if layout.routed == 0:
        return Assignment.without_experts(order[:shared], order[shared:], width)
    return Assignment(order[:shared], order[shared:].view(layout.routed, width))
