"""Partition methods: statistics of one FFN -> which neurons are shared and which expert each other one joins.

A method is a function ``(ActivationStats, Layout, torch.Generator) -> Assignment`` and a line of this table.
"""

from collections.abc import Callable

import torch

from factormix.factor.activations import ActivationStats
from factormix.factor.partition.assignment import Assignment
from factormix.factor.partition.cmoe import cmoe
from factormix.factor.partition.coactivation import coactivation
from factormix.factor.partition.kmeans import kmeans
from factormix.factor.partition.moefication import moefication
from factormix.factor.partition.simple import contiguous, random_split
from factormix.factor.partition.static import flap, wanda
from factormix.nn import Layout

Partition = Callable[[ActivationStats, Layout, torch.Generator], Assignment]

PARTITIONS: dict[str, Partition] = {
    "coactivation": coactivation,
    "kmeans": kmeans,
    "random": random_split,
    "contiguous": contiguous,
    "flap": flap,
    "wanda": wanda,
    "moefication": moefication,
    "cmoe": cmoe,
}

BLIND = ("random", "contiguous", "moefication")
"""Methods that look at no activations, whose statistics then need not be computed."""

STATIC = ("flap", "wanda")
"""Methods that know no experts: for layouts that drop slices, such as S8A0E16."""

ROUTED = ("moefication",)
"""Methods that know no shared neurons: for layouts such as S0A8E16."""

COMPENSATED = ("flap",)
"""Methods that add an output bias."""

__all__ = ["BLIND", "COMPENSATED", "PARTITIONS", "ROUTED", "STATIC", "Assignment", "Partition"]
