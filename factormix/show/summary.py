"""The numbers of the page and of `factormix show --json`: loads, entropies, averages by text, document and token kind.

For experts a column's mean weight is its load, the share of tokens it fired for; the loads of a site add up to K. For
domains it is the mean of the gate's weight. Entropy is that of the mean weights scaled to add up to 1, in bits:
log2 C when all columns are used alike, 0 when one takes everything.
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
    """The JSON of ``factormix show``, as docs/json.md has it."""
    groups = _groups(found)
    everywhere = mean_of_domains(found)
    information = expert_information(found)
    return {
        "schema_version": SCHEMA_VERSION,
        "tokens": len(found.tokens),
        "whole": found.whole,
        "groups": {
            by: [{"name": name, "tokens": int((member == at).sum())} for at, name in enumerate(names)]
            for by, (names, member) in groups.items()
        },
        "sites": [_site(site, groups) | {"information": _known(information, site)} for site in found.sites],
        "domains": None if everywhere is None else _site(everywhere, groups),
    }


def _known(information: dict[str, SiteInformation], site: SiteTrace) -> dict[str, Any] | None:
    return information[site.name].to_dict() if site.name in information else None


def mean_of_domains(found: Trace) -> SiteTrace | None:
    """The mean of all sites' domain weights, token by token, as one more site; None unless all have the same domains.

    Experts have no such mean: expert 3 of one FFN has nothing to do with expert 3 of another.
    """
    gated = [site for site in found.sites if site.kind == "domains"]
    if not gated or len({site.columns for site in gated}) > 1:
        return None
    mean = torch.stack([site.weights for site in gated]).mean(0)  # (T, n)
    return SiteTrace(ALL_SITES, "", "domains", gated[0].gate, gated[0].columns, mean)


def entropy(weights: Tensor) -> float:
    """Entropy in bits of weights (C,) scaled to add up to 1; 0 where all are 0."""
    share = weights.double() / weights.double().sum().clamp_min(1e-300)  # (C,)
    return float(-torch.special.xlogy(share, share).sum() / math.log(2)) + 0.0  # + 0.0: no "-0.0"


def _groups(found: Trace) -> dict[str, tuple[list[str], Tensor]]:
    """Names of the groups, and which one each token is in (T,), for each way to group tokens."""
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
    """Mean weights of each group; None for a document that gave no token."""
    groups = [weights[member == at] for at in range(count)]  # each (t, C)
    return [_rounded(rows.mean(0).tolist()) if len(rows) else None for rows in groups]


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]
