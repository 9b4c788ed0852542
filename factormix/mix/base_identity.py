"""Identify the base that an adapter was made on, by a hash of the weights of the FFNs beside it.

Without this check another base of equal shapes would load the adapter and answer nonsense. Only the FFNs beside the
adapter count, so a base with another head, for instance, is the same base. Weights are rounded to bfloat16 before they
are hashed, so that float32 and bfloat16 copies of a checkpoint count as one base. A base in another dtype or a
quantised one is not checked. Nor is a factored base that loads a dense base's adapter, or the reverse, because their
weights differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from factormix.ffn import FFNSite, get
from factormix.ffn.surgery import dense_linears
from factormix.nn import SparseFFN
from factormix.run.errors import FactorMixError

COMPARABLE = (torch.float32, torch.bfloat16)


def identity_of(ffns: Sequence[nn.Module]) -> str | None:
    """ "dense:<SHA-256>" or "sparse:<SHA-256>" of FFNs that are one module each. None if they cannot be compared."""
    form = "sparse" if any(isinstance(ffn, SparseFFN) for ffn in ffns) else "dense"
    return _identity(form, [ffn.parameters() for ffn in ffns])


def identity_at(model: nn.Module, sites: Sequence[FFNSite]) -> str | None:
    """Like `identity_of`, for the FFNs at sites, whether or not they are isolated. It leaves the model unchanged."""
    try:
        sparse = any(isinstance(get(model, site), SparseFFN) for site in sites)
    except FactorMixError:  # spread over its layer, so dense
        sparse = False
    if sparse:
        return identity_of([get(model, site) for site in sites])
    linears = [[linear for linear in dense_linears(model, site) if linear is not None] for site in sites]
    return _identity("dense", [(p for linear in site_linears for p in linear.parameters()) for site_linears in linears])


def check_base(recorded: str | None, found: str | None, adapter: str | Path) -> None:
    """Refuse an adapter on another base than the one it was made on.

    Args:
        recorded: the identity in the adapter's config, or None.
        found: the identity of this base, or None.
        adapter: the adapter's directory, for the message.

    Raises:
        FactorMixError: the identities differ; the message names both.
    """
    if recorded is None or found is None or recorded == found or recorded.split(":")[0] != found.split(":")[0]:
        return
    raise FactorMixError(
        f"adapter {str(adapter)!r} was made on another base of the same shapes: the FFNs beside it have the hash "
        f"{found} here, but {recorded} is recorded. Name the base it was made from."
    )


def _identity(form: str, weights_by_site: Sequence[Iterable[Tensor]]) -> str | None:
    ffn_hashes = []
    for tensors in weights_by_site:
        hashes = []
        for tensor in tensors:
            if tensor.dtype not in COMPARABLE or tensor.device.type == "meta":
                return None
            rounded = tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8)
            hashes.append(hashlib.sha256(rounded.numpy().tobytes()).hexdigest())
        ffn_hashes.append(" ".join(sorted(hashes)))  # names and order of the tensors must not matter
    return f"{form}:" + hashlib.sha256("\n".join(sorted(ffn_hashes)).encode()).hexdigest()
