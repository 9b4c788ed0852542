"""A small trace whose every number can be checked by eye, and a text that tries to break out of the page."""

from __future__ import annotations

import pytest
import torch

from factormix.show.pieces import Token
from factormix.show.trace import SiteTrace, Trace
from tests.show.tiny import KINDS, PIECES


@pytest.fixture
def small() -> Trace:
    """Six tokens of two documents, two sites of 3 experts (2 fire), two sites of 2 domains."""
    names = [piece or "<s>" for piece in PIECES]
    tokens = tuple(Token(i, PIECES[i], "", names[i], KINDS[i], int(i > 3)) for i in range(6))  # type: ignore[arg-type]
    chosen = torch.tensor([[0, 1], [0, 1], [0, 2], [2, 0], [1, 2], [0, 1]])  # (6, 2)
    scores = torch.tensor([[2.0, 1, 0], [2, 1, 0], [2, 0, 1], [1, 0, 2], [-8, 2, 1], [2, 1, 0]])  # (6, 3)
    fired = torch.zeros(6, 3).scatter_(1, chosen, 1.0)  # (6, 3)
    columns = ("0", "1", "2")
    weights = torch.tensor([[2.0, 0], [1, 1], [1, 1], [1, 1], [0.5, 0.25], [0, 0]])  # (6, 2)
    domains = ("law", "<i>medicine</i>")
    return Trace(
        tokens,
        ("first", "second"),
        ("one", "two"),
        (
            SiteTrace("layer 0", "layers.0.mlp", "experts", "hard", columns, fired, scores, chosen),
            SiteTrace("layer 1", "layers.1.mlp", "experts", "soft", columns, fired, -scores, chosen.flip(1)),
            SiteTrace("layer 0", "layers.0.mlp", "domains", "sigmoid", domains, weights),
            SiteTrace("layer 1", "layers.1.mlp", "domains", "sigmoid", domains, weights.flip(1)),
        ),
        whole=True,
    )
