"""Scoring: how a container turns router logits into the experts of a token and their weights.

FactorMix's chosen experts all have weight 1, or the paper's E / K. Containers weigh them by a softmax or a sigmoid of
their logits. With logits near zero both are nearly uniform and keep their order, so a container's weights become

    softmax, top K renormalised    1 / K        softmax, not renormalised    1 / R        sigmoid, renormalised    1 / K

and the down projections are multiplied by K or R (`Scoring.gain`): the same FFN to rounding. How near zero is a
trade: float32 has fewer distinct softmax values the smaller the logits, so near-ties flip; see gates.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scoring:
    """A container's router after its logits.

    Attributes:
        kind: "topk" chooses by the logits, then softmax over the chosen; "softmax" and "sigmoid" score all experts and
            choose by the scores.
        renormalised: the weights of the chosen sum to 1.
        scale: what the weights are multiplied by at the end (GLM-4's routed_scaling_factor).
    """

    kind: Literal["topk", "softmax", "sigmoid"]
    renormalised: bool = True
    scale: float = 1.0

    @property
    def raw(self) -> bool:
        """The weights are the scores themselves: a soft gate's container."""
        return self.kind == "sigmoid" and not self.renormalised

    def scores(self, logits: Tensor) -> Tensor:
        """What experts are chosen by: logits (T, R) float32 -> (T, R)."""
        if self.kind == "topk":
            return logits
        return logits.sigmoid() if self.kind == "sigmoid" else logits.softmax(-1)

    def weights(self, logits: Tensor, chosen: Tensor) -> Tensor:
        """Weights of experts that were chosen already: logits (T, R), chosen (T, K) -> (T, K)."""
        if self.kind == "topk":
            return logits.float().gather(1, chosen).softmax(-1)  # (T, K)
        weights = self.scores(logits.float()).gather(1, chosen)  # (T, K)
        if self.renormalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * self.scale

    def gain(self, active: int, routed: int) -> float:
        """One over the weight of a chosen expert when all logits are equal: K, R, or less by `scale`. 1 for a sigmoid
        that is not renormalised: its weights are the gate's own."""
        if self.raw:
            return 1.0
        return (active if self.renormalised else routed) / self.scale


def top(scores: Tensor, active: int) -> Tensor:
    """The chosen experts as a set: (T, R) -> (T, K), in ascending order."""
    return scores.topk(active, dim=-1).indices.sort(-1).values


def flipped(one: Tensor, other: Tensor) -> Tensor:
    """Where two choices (T, K), both in ascending order, are different sets: (T) bool."""
    return torch.ne(one, other).any(-1)
