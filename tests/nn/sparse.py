"""A dense tiny model and its sparse twin: same weights, neurons in a random order, routers random."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from factormix.factor.assemble import assemble, sparse_spec
from factormix.factor.partition import Assignment
from factormix.ffn import FFNSite, FFNWeights, find_sites, swap, weights
from factormix.nn import Layout, SparseFFN, SparseSpec, adopt
from tests.families import tiny_model


def random_assignment(inner: int, layout: Layout, seed: int = 0) -> Assignment:
    order = torch.randperm(inner, generator=torch.Generator().manual_seed(seed))
    cut = layout.shared * layout.width(inner)
    return Assignment(order[:cut], order[cut:].view(layout.routed, layout.width(inner)))


def random_router(ffn: SparseFFN, seed: int = 0) -> SparseFFN:
    if ffn.router is not None:
        with torch.no_grad():
            noise = torch.randn(ffn.router.weight.shape, generator=torch.Generator().manual_seed(seed))
            ffn.router.weight.copy_(noise)
    return ffn


def sparse_ffn(
    site: FFNSite, parts: FFNWeights, layout: Layout, output_weight: str = "hard", seed: int = 0
) -> SparseFFN:
    spec = sparse_spec(site, layout, output_weight)
    ffn = assemble(spec, parts, random_assignment(site.inner, layout, seed))
    return random_router(ffn, seed).eval()


def sparsify(
    model: PreTrainedModel, layout: str = "S1A1E4", output_weight: str = "hard", seed: int = 0
) -> PreTrainedModel:
    """Make a dense model sparse, in place."""
    sites = find_sites(model)
    specs: dict[FFNSite, SparseSpec] = {}
    for site in sites:
        ffn = sparse_ffn(site, weights(model, site), Layout.parse(layout), output_weight, seed + site.index)
        swap(model, site, ffn)
        specs[site] = ffn.spec
    adopt(model, specs, {"by": "a test"})
    return model


def twins(
    family: str, layout: str = "S1A1E4", output_weight: str = "hard", seed: int = 0
) -> tuple[PreTrainedModel, ...]:
    """A dense tiny model, and a sparse one made of the same weights."""
    return tiny_model(family, seed), sparsify(tiny_model(family, seed), layout, output_weight, seed)


def lone_ffn(
    hidden: int = 12,
    width: int = 4,
    layout: str = "S1A2E5",
    gated: bool = True,
    biased: bool = False,
    output_weight: str = "hard",
    seed: int = 0,
) -> SparseFFN:
    """A random SparseFFN of any size."""
    cut = Layout.parse(layout)
    spec = SparseSpec(
        hidden,
        width,
        cut.shared,
        cut.active,
        cut.slices,
        "silu" if gated else "gelu",
        gated,
        biased,
        biased,
        output_weight,
    )  # type: ignore[arg-type]
    ffn = SparseFFN(spec)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in ffn.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return ffn.eval()
