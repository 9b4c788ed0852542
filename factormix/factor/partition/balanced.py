"""Balanced assignment: every group gets the same number of members, at a high total score."""

from __future__ import annotations

import torch
from torch import Tensor


def balanced_assignment(score: Tensor) -> Tensor:
    """Give each of N members to one of R groups of N / R, most decided members first.

    Each round, every unplaced member bids for its best open group; a group takes the bidders that would lose most
    by their second choice, until it is full. At least one group's bidders are all placed a round, so at most
    about R rounds run, whatever N.

    Args:
        score: (R, N), the higher the better.

    Returns:
        (N,) int64, the group of each member.
    """
    groups, members = score.shape
    room = torch.full((groups,), members // groups)
    owner = torch.full((members,), -1)
    left = torch.arange(members)
    while len(left):
        open_groups = room.nonzero().flatten()  # (G,)
        top = score[open_groups][:, left].topk(min(2, len(open_groups)), dim=0)  # (1 or 2, M)
        regret = top.values[0] - top.values[-1] if len(open_groups) > 1 else torch.zeros(len(left))  # (M,)
        bid = open_groups[top.indices[0]]  # (M,)
        by_regret = regret.argsort(descending=True, stable=True)
        by_group = by_regret[bid[by_regret].argsort(stable=True)]  # (M,) grouped by bid, within it by regret
        sizes = torch.bincount(bid, minlength=groups)
        starts = sizes.cumsum(0) - sizes
        rank = torch.arange(len(left)) - starts[bid[by_group]]  # (M,) place in the queue of its group
        placed = by_group[rank < room[bid[by_group]]]
        owner[left[placed]] = bid[placed]
        room -= torch.bincount(bid[placed], minlength=groups)
        keep = torch.ones(len(left), dtype=torch.bool)
        keep[placed] = False
        left = left[keep]
    return owner


def balanced_kmeans(points: Tensor, groups: int, generator: torch.Generator, rounds: int = 12) -> Tensor:
    """Spherical k-means with groups of equal size: points (N, D) -> group of each point (N,)."""
    unit = torch.nn.functional.normalize(points.float(), dim=1)  # (N, D)
    centres = unit[torch.randperm(len(unit), generator=generator)[:groups]]  # (R, D)
    owner = torch.full((len(unit),), -1)
    for _ in range(rounds):
        before, owner = owner, balanced_assignment(centres @ unit.T)  # (N,)
        if torch.equal(before, owner):
            break
        sums = torch.zeros(groups, unit.shape[1]).index_add_(0, owner, unit)  # (R, D)
        centres = torch.nn.functional.normalize(sums, dim=1)
    return owner
