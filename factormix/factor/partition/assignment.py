"""Assignment: where each neuron of one FFN goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Assignment:
    """Disjoint lists of neuron indices that together are all I neurons.

    Attributes:
        shared: (S*W,) int64, always on.
        experts: (R, W) int64, one row an expert.
    """

    shared: Tensor
    experts: Tensor

    def __post_init__(self) -> None:
        every = self.order.sort().values
        if not torch.equal(every, torch.arange(len(every))):
            raise AssertionError("an assignment must name every neuron once")

    @property
    def order(self) -> Tensor:
        """(I,) the neurons in packed order: shared first, then expert by expert."""
        return torch.cat([self.shared, self.experts.flatten()])

    @classmethod
    def from_owner(cls, shared: Tensor, routed: Tensor, owner: Tensor, experts: int) -> Assignment:
        """From `owner` (R*W,), the expert of each neuron in `routed` (R*W,); experts are of equal size."""
        order = owner.argsort(stable=True)  # (R*W,)
        return cls(shared.sort().values, routed[order].view(experts, -1))  # (R, W)
