"""Describe how a container turns router logits into the experts of a token and their weights.

In FactorMix all chosen experts have the same weight: 1, or the paper's E / K. Containers weigh them by a softmax or a
sigmoid of their logits. For logits near zero both are nearly equal and keep their order, so a container's weights are

    softmax, top K renormalised    1 / K        softmax, not renormalised    1 / R        sigmoid, renormalised    1 / K

The down projections are multiplied by K or R (`Scoring.gain`), which gives the same FFN to rounding. The logits must
not be too small: the smaller they are, the fewer distinct softmax values float32 has, so near-ties flip. See
router_scale.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scoring:
    """How a container's router goes on from its logits.

    Attributes:
        kind: "topk" chooses by the logits and takes the softmax over the chosen experts. "softmax" and "sigmoid" score
            all experts and choose by the scores.
        renormalised: whether the weights of the chosen experts are scaled to sum to 1.
        scale: factor of the weights (GLM-4's routed_scaling_factor).
    """

    kind: Literal["topk", "softmax", "sigmoid"]
    renormalised: bool = True
    scale: float = 1.0

    @property
    def raw(self) -> bool:
        """True if the weights are the scores themselves, as a soft gate needs."""
        return self.kind == "sigmoid" and not self.renormalised

    def scores(self, logits: Tensor) -> Tensor:
        """The scores by which experts are chosen: logits (T, R) float32 -> (T, R)."""
        if self.kind == "topk":
            return logits
        return logits.sigmoid() if self.kind == "sigmoid" else logits.softmax(-1)

    def weights(self, logits: Tensor, chosen: Tensor) -> Tensor:
        """The weights of the chosen experts: logits (T, R), chosen (T, K) int64 -> (T, K)."""
        if self.kind == "topk":
            return logits.float().gather(1, chosen).softmax(-1)  # (T, K)
        weights = self.scores(logits.float()).gather(1, chosen)  # (T, K)
        if self.renormalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * self.scale

    def gain(self, active: int, routed: int) -> float:
        """1 / (weight of a chosen expert) if all logits are equal: K or R, divided by `scale`.

        It is 1 for a sigmoid that is not renormalised, because its weights are those of FactorMix's soft gate.
        """
        if self.raw:
            return 1.0
        return (active if self.renormalised else routed) / self.scale


def top(scores: Tensor, active: int) -> Tensor:
    """The K experts with the highest scores, in ascending order: scores (T, R) -> (T, K) int64."""
    return scores.topk(active, dim=-1).indices.sort(-1).values


def flipped(one: Tensor, other: Tensor) -> Tensor:
    """True where two choices (T, K), both in ascending order, are different sets: (T) bool."""
    return torch.ne(one, other).any(-1)
