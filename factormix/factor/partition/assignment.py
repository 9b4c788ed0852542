"""Assignment: where each neuron of one FFN goes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Assignment:
    """Disjoint lists of neuron indices that together are all I neurons.

    Attributes:
        shared: (S*W,) int64, always on.
        experts: (R, W) int64, one row an expert.
        dropped: int64, gone; empty except in static pruning.
        compensation: (H,) what is added to the output bias for the dropped ones, or None.
        representatives: (R,) int64, the neuron that stands for each expert in a router of kind "neuron", or None.
    """

    shared: Tensor
    experts: Tensor
    dropped: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    compensation: Tensor | None = None
    representatives: Tensor | None = None

    def __post_init__(self) -> None:
        every = torch.cat([self.order, self.dropped]).sort().values
        if not torch.equal(every, torch.arange(len(every))):
            raise AssertionError("an assignment must name every neuron once")

    @property
    def order(self) -> Tensor:
        """The neurons that stay, in packed order: shared first, then expert by expert."""
        return torch.cat([self.shared, self.experts.flatten()])

    @classmethod
    def without_experts(
        cls, shared: Tensor, dropped: Tensor, width: int, compensation: Tensor | None = None
    ) -> Assignment:
        """Static: `shared` stay, `dropped` (maybe empty) go; W is `width`."""
        return cls(shared, shared.new_empty(0, width), dropped, compensation)

    @classmethod
    def from_owner(
        cls, shared: Tensor, routed: Tensor, owner: Tensor, experts: int, representatives: Tensor | None = None
    ) -> Assignment:
        """From `owner` (R*W,), the expert of each neuron in `routed` (R*W,); experts are of equal size."""
        order = owner.argsort(stable=True)  # (R*W,)
        packed = routed[order].view(experts, -1)  # (R, W)
        return cls(shared.sort().values, packed, representatives=representatives)
