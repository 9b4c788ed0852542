"""Which experts serve which text: the mutual information of expert and text at every site, against chance.

    I(E; D) = sum over experts e and texts d of p(e, d) log2( p(e, d) / (p(e) p(d)) )

p(e, d) is the share of all choices (a token makes K) that fall on expert e in text d. A finite sample has some
information by chance, the more so since the tokens of a document are alike; so the texts' names are shuffled among
whole documents, and I is computed again. What stands above that is real. Where a text has fewer than `DOCUMENTS`,
pieces of `PIECE` tokens are shuffled instead, which takes what is peculiar to one document for peculiar to its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from factormix.show.trace import SiteTrace, Trace

DOCUMENTS = 4  # of every text, from which on whole documents are shuffled
PIECE = 64  # tokens that are shuffled together, at most, where there are fewer
SHUFFLES = 200


@dataclass(frozen=True)
class SiteInformation:
    """Of one site.

    Attributes:
        name: of the site.
        bits: I(E; D).
        shuffled: its mean under shuffled names.
        p: share of shuffles with as much information or more, (1 + count) / (1 + shuffles).
        lift: (D, R) p(e | d) / p(e): above 1 where an expert fires more for a text than for all.
    """

    name: str
    bits: float
    shuffled: float
    p: float
    lift: Tensor

    def to_dict(self) -> dict[str, Any]:
        """The entry ``information`` of a site in docs/json.md."""
        rows = [[round(value, 4) for value in row] for row in self.lift.tolist()]
        return {"bits": round(self.bits, 5), "shuffled": round(self.shuffled, 5), "p": round(self.p, 4), "lift": rows}


def expert_information(found: Trace, shuffles: int = SHUFFLES, seed: int = 0) -> dict[str, SiteInformation]:
    """By the site's name; empty when there is only one text, or no experts."""
    texts = list(dict.fromkeys(found.texts))
    if len(texts) < 2:
        return {}
    of_document = torch.tensor([texts.index(text) for text in found.texts])  # (documents,)
    document = torch.tensor([token.document for token in found.tokens])  # (T,)
    piece, owner = _pieces(document, of_document)  # (T,), (P,)
    generator = torch.Generator().manual_seed(seed)
    owners = torch.stack([owner[torch.randperm(len(owner), generator=generator)] for _ in range(shuffles)])  # (Q, P)
    sites = [site for site in found.sites if site.kind == "experts"]
    return {site.name: _of_site(site, piece, owner, owners, len(texts)) for site in sites}


def mutual_information(counts: Tensor) -> Tensor:
    """Bits between the two last dimensions of counts (..., D, R) -> (...)."""
    joint = counts.double() / counts.sum((-2, -1), keepdim=True)
    apart = joint.sum(-1, keepdim=True) * joint.sum(-2, keepdim=True)  # (..., D, R)
    return torch.special.xlogy(joint, joint / apart.clamp_min(1e-300)).sum((-2, -1)) / torch.log(torch.tensor(2.0))


def serving(
    found: dict[str, SiteInformation], texts: Sequence[str], most: int = 8
) -> list[tuple[str, str, int, float]]:
    """The strongest ties (site, text, expert, lift), at most `most`, one a site, of sites above chance (p < 0.05)."""
    ties = []
    for name, of in found.items():
        if of.p < 0.05:
            at = int(of.lift.argmax())
            text, expert = divmod(at, of.lift.shape[1])
            ties.append((name, texts[text], expert, float(of.lift.flatten()[at])))
    return sorted(ties, key=lambda tie: -tie[3])[:most]


def _pieces(document: Tensor, of_document: Tensor) -> tuple[Tensor, Tensor]:
    """Which piece each token is in (T,), and the text of each piece (P,): documents, or parts of them."""
    read = document.unique()
    size = len(document) if bool((of_document[read].bincount() >= DOCUMENTS).all()) else PIECE
    piece = torch.zeros_like(document)
    owner: list[int] = []
    for number in read.tolist():
        rows = (document == number).nonzero()[:, 0]  # (t,)
        piece[rows] = len(owner) + torch.arange(len(rows)) // size
        owner += [int(of_document[number])] * -(-len(rows) // size)
    return piece, torch.tensor(owner)


def _of_site(site: SiteTrace, piece: Tensor, owner: Tensor, owners: Tensor, texts: int) -> SiteInformation:
    by_piece = torch.zeros(len(owner), site.weights.shape[1]).index_add_(0, piece, site.weights)  # (P, R)
    counts = _counts(by_piece, owner, texts)  # (D, R)
    bits = float(mutual_information(counts))
    by_chance = mutual_information(torch.stack([_counts(by_piece, each, texts) for each in owners]))  # (Q,)
    given = counts / counts.sum(1, keepdim=True).clamp_min(1e-30)  # (D, R)
    lift = given / (counts.sum(0) / counts.sum()).clamp_min(1e-30)
    p = (1 + int((by_chance >= bits).sum())) / (1 + len(by_chance))
    return SiteInformation(site.name, bits, float(by_chance.mean()), p, lift)


def _counts(by_piece: Tensor, owner: Tensor, texts: int) -> Tensor:
    return torch.zeros(texts, by_piece.shape[1]).index_add_(0, owner, by_piece)  # (D, R)
