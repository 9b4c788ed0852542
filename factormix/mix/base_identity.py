"""Which base an adapter was made on: a hash of the weights of the FFNs it stands beside.

Another base of equal shapes would take the adapter without a word, and answer nonsense. Only those FFNs count: a base
that differs elsewhere, such as another head, is the same base to an adapter. Weights are rounded to bfloat16 before
they are hashed, so float32 and bfloat16 copies of one checkpoint are one base. A base in another dtype, or quantised,
is not checked, nor is a factored base that is given an adapter of a dense one, or the reverse: their weights differ.
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
    """ "dense:<SHA-256>" or "sparse:<SHA-256>" of FFNs that are one module each; None where they cannot be compared."""
    form = "sparse" if any(isinstance(ffn, SparseFFN) for ffn in ffns) else "dense"
    return _identity(form, [ffn.parameters() for ffn in ffns])


def identity_at(model: nn.Module, sites: Sequence[FFNSite]) -> str | None:
    """The same of the FFNs at sites, be they one module or spread over their layer; changes nothing."""
    try:
        sparse = any(isinstance(get(model, site), SparseFFN) for site in sites)
    except FactorMixError:  # spread over its layer, so dense
        sparse = False
    if sparse:
        return identity_of([get(model, site) for site in sites])
    linears = [[linear for linear in dense_linears(model, site) if linear is not None] for site in sites]
    return _identity("dense", [(p for linear in of for p in linear.parameters()) for of in linears])


def check_base(recorded: str | None, found: str | None, adapter: str | Path) -> None:
    """Refuse an adapter on another base than it was made on.

    Raises:
        FactorMixError: names both hashes.
    """
    if recorded is None or found is None or recorded == found or recorded.split(":")[0] != found.split(":")[0]:
        return
    raise FactorMixError(
        f"adapter {str(adapter)!r} was made on another base of the same shapes: the FFNs it stands beside have the "
        f"hash {found} here, {recorded} is recorded. Name the base it was made from."
    )


def _identity(form: str, of_sites: Sequence[Iterable[Tensor]]) -> str | None:
    of_ffns = []
    for tensors in of_sites:
        hashes = []
        for tensor in tensors:
            if tensor.dtype not in COMPARABLE or tensor.device.type == "meta":
                return None
            rounded = tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8)
            hashes.append(hashlib.sha256(rounded.numpy().tobytes()).hexdigest())
        of_ffns.append(" ".join(sorted(hashes)))  # whatever the tensors are called, and in whatever order
    return f"{form}:" + hashlib.sha256("\n".join(sorted(of_ffns)).encode()).hexdigest()
