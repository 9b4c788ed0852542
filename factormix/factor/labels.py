"""Labels: the K experts that a router should have chosen for a token, judged by the frozen dense FFN.

All are computed at the student's own states x, from the outputs of the experts and of the dense FFN there
(FactorLLM's released code takes them from states that the student never sees).

    paper          distance of each expert alone to F(x) / (N / K)             (FactorLLM section 3.3, released form)
    contribution   norm of E_i(x)
    random         any K: the baseline that shows what routing is worth
    joint          the subset whose sum is nearest to F(x) - shared(x): exact where there are few subsets, else greedy
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT_SUBSETS = 128  # up to this many subsets of K in R, the best one is looked for among all


@dataclass(frozen=True)
class Labels:
    """What the router is trained towards.

    Attributes:
        chosen: (T, R) float, 1 for the K experts of the label and 0 for the others.
        gain: (T, R) how good each expert is for the token; the drop in squared error where that is defined.
    """

    chosen: Tensor
    gain: Tensor


def label(method: str, outputs: Tensor, target: Tensor, active: int) -> Labels:
    """Labels of a batch of tokens.

    Args:
        method: "joint", "contribution", "paper" or "random".
        outputs: (T, R, H) of every expert.
        target: (T, H) what they should add up to: the dense output less shared neurons and output bias.
        active: K.
    """
    if method == "contribution":
        gain = outputs.norm(dim=-1)  # (T, R)
    elif method == "paper":
        share = active / outputs.shape[1]
        gain = -(outputs - share * target.unsqueeze(1)).norm(dim=-1)  # (T, R)
    elif method == "random":
        seeded = torch.Generator().manual_seed(0)
        gain = torch.rand(outputs.shape[:2], generator=seeded).to(outputs.device)  # (T, R)
    else:
        return _joint(outputs, target, active)
    return Labels(top_k_hot(gain, active), gain)


def top_k_hot(score: Tensor, active: int) -> Tensor:
    """score (T, R) -> (T, R), 1 at the K largest of each row."""
    return torch.zeros_like(score).scatter_(1, score.topk(active, dim=1).indices, 1.0)


def _joint(outputs: Tensor, target: Tensor, active: int) -> Labels:
    """The subset A that minimises |target - sum_A E_i|^2 = |target|^2 - 2 sum_A q_i + sum_A sum_A G_ij."""
    gram = outputs @ outputs.transpose(1, 2)  # (T, R, R)
    projection = torch.einsum("trh,th->tr", outputs, target)  # (T, R), q
    gain = 2 * projection - gram.diagonal(dim1=1, dim2=2)  # (T, R), the drop if the expert came alone
    routed = outputs.shape[1]
    if math.comb(routed, active) <= EXACT_SUBSETS:
        subsets = torch.tensor(list(itertools.combinations(range(routed), active)), device=gram.device)  # (N, K)
        member = torch.zeros(len(subsets), routed, device=gram.device, dtype=gram.dtype).scatter_(
            1, subsets, 1.0
        )  # (N, R)
        drop = 2 * projection @ member.T - torch.einsum("nr,trs,ns->tn", member, gram, member)  # (T, N)
        return Labels(member[drop.argmax(1)], gain)
    rows = torch.arange(len(gram), device=gram.device)
    chosen = torch.zeros_like(gain)
    now = gain.clone()  # (T, R), the drop from adding each expert to those chosen so far
    for _ in range(active):
        pick = now.masked_fill(chosen > 0, -math.inf).argmax(1)  # (T,)
        chosen[rows, pick] = 1.0
        now = now - 2 * gram[rows, :, pick]  # the part of it that the pick already covers
    return Labels(chosen, gain)
