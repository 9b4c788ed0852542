"""Measure which experts serve which text: the mutual information of expert and text at every site, against chance.

    I(E; D) = sum over experts e and texts d of p(e, d) log2( p(e, d) / (p(e) p(d)) )

p(e, d) is the share of all choices that fall on expert e in text d; each token makes K choices. A finite sample shows
some information by chance, and more than usual because the tokens of one document are alike. So I is computed again
with the texts' names shuffled among whole documents: only information above that level is real.

If a text has fewer than `DOCUMENTS` documents, pieces of `PIECE` tokens are shuffled instead. This cannot tell a
property of one document from a property of its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from factormix.show.trace import SiteTrace, Trace

DOCUMENTS = 4  # whole documents are shuffled if every text has at least this many
PIECE = 64  # tokens in one shuffled piece, at most, if a text has fewer documents
SHUFFLES = 200  # how often the names are shuffled


@dataclass(frozen=True)
class SiteInformation:
    """The information at one site.

    Attributes:
        name: the site's name.
        bits: I(E; D), in bits.
        shuffled: the mean of I(E; D) over the shuffles, in bits.
        p: share of shuffles with at least as much information, (1 + count) / (1 + shuffles).
        lift: (D, R) float32, p(e | d) / p(e): above 1 if expert e runs more often for text d than for all texts.
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
    """The information at every site with experts, by the site's name.

    Args:
        found: what `trace` returned.
        shuffles: how often the texts' names are shuffled.
        seed: seed of the shuffles.

    Returns:
        An empty dict if there is only one text, or no site with experts.
    """
    texts = list(dict.fromkeys(found.texts))
    if len(texts) < 2:
        return {}
    of_document = torch.tensor([texts.index(text) for text in found.texts])  # (documents,)
    document = torch.tensor([token.document for token in found.tokens])  # (T,)
    piece, owner = _pieces(document, of_document)  # (T,), (P,)
    generator = torch.Generator().manual_seed(seed)
    owners = torch.stack([owner[torch.randperm(len(owner), generator=generator)] for _ in range(shuffles)])  # (Q, P)
    sites = [site for site in found.sites if site.kind == "experts"]
    return {site.name: _site_information(site, piece, owner, owners, len(texts)) for site in sites}


def mutual_information(counts: Tensor) -> Tensor:
    """Mutual information, in bits, of the two last dimensions: counts (..., D, R) -> (...), float64."""
    joint = counts.double() / counts.sum((-2, -1), keepdim=True)
    apart = joint.sum(-1, keepdim=True) * joint.sum(-2, keepdim=True)  # (..., D, R)
    return torch.special.xlogy(joint, joint / apart.clamp_min(1e-300)).sum((-2, -1)) / torch.log(torch.tensor(2.0))


def serving(
    found: dict[str, SiteInformation], texts: Sequence[str], most: int = 8
) -> list[tuple[str, str, int, float]]:
    """The strongest pairs (site, text, expert, lift): one per site, at most `most`, from sites with p < 0.05."""
    pairs = []
    for name, information in found.items():
        if information.p < 0.05:
            largest = int(information.lift.argmax())
            text, expert = divmod(largest, information.lift.shape[1])
            pairs.append((name, texts[text], expert, float(information.lift.flatten()[largest])))
    return sorted(pairs, key=lambda pair: -pair[3])[:most]


def _pieces(document: Tensor, of_document: Tensor) -> tuple[Tensor, Tensor]:
    """The piece each token is in (T,), and the text of each piece (P,). A piece is a document or a part of one."""
    read = document.unique()
    size = len(document) if bool((of_document[read].bincount() >= DOCUMENTS).all()) else PIECE
    piece = torch.zeros_like(document)
    owner: list[int] = []
    for number in read.tolist():
        rows = (document == number).nonzero()[:, 0]  # (t,)
        piece[rows] = len(owner) + torch.arange(len(rows)) // size
        owner += [int(of_document[number])] * -(-len(rows) // size)
    return piece, torch.tensor(owner)


def _site_information(site: SiteTrace, piece: Tensor, owner: Tensor, owners: Tensor, texts: int) -> SiteInformation:
    by_piece = torch.zeros(len(owner), site.weights.shape[1]).index_add_(0, piece, site.weights)  # (P, R)
    counts = _counts(by_piece, owner, texts)  # (D, R)
    bits = float(mutual_information(counts))
    by_chance = mutual_information(torch.stack([_counts(by_piece, shuffled, texts) for shuffled in owners]))  # (Q,)
    given = counts / counts.sum(1, keepdim=True).clamp_min(1e-30)  # (D, R)
    lift = given / (counts.sum(0) / counts.sum()).clamp_min(1e-30)
    p = (1 + int((by_chance >= bits).sum())) / (1 + len(by_chance))
    return SiteInformation(site.name, bits, float(by_chance.mean()), p, lift)


def _counts(by_piece: Tensor, owner: Tensor, texts: int) -> Tensor:
    return torch.zeros(texts, by_piece.shape[1]).index_add_(0, owner, by_piece)  # (D, R)
