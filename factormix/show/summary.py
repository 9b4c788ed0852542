"""Compute the numbers of the page and of `factormix show --json`: loads, entropies, and means by group of tokens.

The groups are texts, documents and kinds of token. An expert's mean weight is its load, the share of tokens for which
it runs; the loads of a site add up to K. A domain's mean weight is the mean of the gate's weight. The entropy, in bits,
is that of the mean weights scaled to add up to 1: log2 C if all columns are used alike, 0 if one takes everything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from factormix.show.information import SiteInformation, expert_information
from factormix.show.pieces import TOKEN_KINDS
from factormix.show.trace import SiteTrace, Trace

SCHEMA_VERSION = 1
ALL_SITES = "all sites"


def summarise(found: Trace) -> dict[str, Any]:
    """The JSON of ``factormix show``, as docs/json.md describes it.

    Args:
        found: what `trace` returned.
    """
    groups = _groups(found)
    everywhere = mean_of_domains(found)
    information = expert_information(found)
    return {
        "schema_version": SCHEMA_VERSION,
        "tokens": len(found.tokens),
        "whole": found.whole,
        "groups": {
            by: [{"name": name, "tokens": int((member == group).sum())} for group, name in enumerate(names)]
            for by, (names, member) in groups.items()
        },
        "sites": [_site(site, groups) | {"information": _to_json(information, site)} for site in found.sites],
        "domains": None if everywhere is None else _site(everywhere, groups),
    }


def _to_json(information: dict[str, SiteInformation], site: SiteTrace) -> dict[str, Any] | None:
    return information[site.name].to_dict() if site.name in information else None


def mean_of_domains(found: Trace) -> SiteTrace | None:
    """The mean of all sites' domain weights, token by token, as one more site. None unless all have the same domains.

    There is no such mean for experts, because expert 3 of one FFN has nothing to do with expert 3 of another.
    """
    gated = [site for site in found.sites if site.kind == "domains"]
    if not gated or len({site.columns for site in gated}) > 1:
        return None
    mean = torch.stack([site.weights for site in gated]).mean(0)  # (T, n)
    return SiteTrace(ALL_SITES, "", "domains", gated[0].gate, gated[0].columns, mean)


def entropy(weights: Tensor) -> float:
    """Entropy, in bits, of weights (C,) scaled to add up to 1. It is 0 if all weights are 0."""
    share = weights.double() / weights.double().sum().clamp_min(1e-300)  # (C,)
    return float(-torch.special.xlogy(share, share).sum() / math.log(2)) + 0.0  # adding 0.0 turns -0.0 into 0.0


def _groups(found: Trace) -> dict[str, tuple[list[str], Tensor]]:
    """For each way to group tokens: the groups' names, and the group each token is in (T,)."""
    document = torch.tensor([token.document for token in found.tokens])  # (T,)
    texts = list(dict.fromkeys(found.texts))
    of_document = torch.tensor([texts.index(text) for text in found.texts])  # (D,)
    present = {token.kind for token in found.tokens}
    kinds = [kind for kind in TOKEN_KINDS if kind in present]
    kind = torch.tensor([kinds.index(token.kind) for token in found.tokens])  # (T,)
    return {
        "text": (texts, of_document[document]),
        "document": (list(found.documents), document),
        "kind": (list(kinds), kind),
    }


def _site(site: SiteTrace, groups: dict[str, tuple[list[str], Tensor]]) -> dict[str, Any]:
    mean = site.weights.mean(0)  # (C,)
    return {
        "name": site.name,
        "path": site.path,
        "kind": site.kind,
        "gate": site.gate,
        "columns": list(site.columns),
        "active": None if site.chosen is None else site.chosen.shape[1],
        "mean": _rounded(mean.tolist()),
        "entropy": round(entropy(mean), 4),
        "entropy_max": round(math.log2(len(site.columns)), 4),
        "by": {by: _means(site.weights, member, len(names)) for by, (names, member) in groups.items()},
    }


def _means(weights: Tensor, member: Tensor, count: int) -> list[list[float] | None]:
    """Mean weights of each group. None for a group without tokens."""
    groups = [weights[member == group] for group in range(count)]  # each (t, C)
    return [_rounded(rows.mean(0).tolist()) if len(rows) else None for rows in groups]


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]
