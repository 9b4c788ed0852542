"""The adapter and the FFN it stands beside: fresh changes nothing, whatever the family, form and kind of FFN."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from factormix import FactorMixError
from factormix.experts.reference import reference
from factormix.ffn import find_sites, get, isolate, swap
from factormix.nn import DomainAdapter, DomainAdapterSpec, DomainFFN, SparseFFN
from tests.families import TINY, tiny_model, tiny_output
from tests.nn.sparse import lone_ffn, sparsify

FORMS = [("ffn", "input"), ("bottleneck", "input"), ("bottleneck", "neurons")]


def spec_for(site, form: str, reads: str, width: int = 8) -> DomainAdapterSpec:  # type: ignore[no-untyped-def]
    biased = site.up_bias or site.gate_bias
    return DomainAdapterSpec.of_form(
        form, reads, width, site.hidden, site.inner, site.activation, site.gated, biased
    )  # fmt: skip


def fill(adapter: DomainAdapter, seed: int = 0) -> DomainAdapter:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapter


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("family", sorted(TINY))
def test_fresh_adapters_change_nothing_and_filled_ones_do(family: str, sparse: bool) -> None:
    model = tiny_model(family)
    sites = find_sites(model)
    if sparse:
        sparsify(model)
    want = tiny_output(model)
    for site in sites:
        layer = DomainFFN(isolate(model, site), site)
        for form, reads in FORMS:
            layer.add(f"{form}-{reads}", DomainAdapter(spec_for(site, form, reads)))
        swap(model, site, layer)
    assert torch.equal(tiny_output(model), want)
    for form, reads in FORMS:
        fill(get(model, sites[0]).mixda_adapters[f"{form}-{reads}"])
        get(model, sites[0]).activate([f"{form}-{reads}"])
        assert (tiny_output(model) - want).abs().max() > 1e-4
    for site in sites:
        get(model, site).activate([])
    assert torch.equal(tiny_output(model), want)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_the_equation(gated: bool) -> None:
    spec = DomainAdapterSpec.of_form("ffn", "input", 5, 12, 40, "silu" if gated else "gelu", gated, True)
    adapter, x = fill(DomainAdapter(spec)), torch.randn(2, 3, 12)
    act = ACT2FN[spec.activation]
    projected = x @ adapter.in_proj.T + adapter.in_bias
    neurons = act(projected[..., :5]) * projected[..., 5:] if gated else act(projected)
    assert torch.allclose(adapter(x), neurons @ adapter.out_proj.T, atol=1e-6)
    assert sum(p.numel() for p in adapter.parameters()) == spec.parameters


def test_the_papers_adapter_has_the_papers_size() -> None:
    spec = DomainAdapterSpec.of_form("bottleneck", "neurons", 256, 1024, 4096, "gelu", False, True)
    assert spec.parameters == 4096 * 256 + 256 + 256 * 1024 + 1024 == 1_312_000
    fresh = DomainAdapter(spec)
    assert fresh.out_proj.abs().max() == 0 and fresh.out_bias.abs().max() == 0 and fresh.in_proj.std() > 0


def test_a_bottleneck_reads_the_ffns_own_neurons() -> None:
    model = tiny_model("llama")
    site = find_sites(model)[0]
    mlp = get(model, site)
    x = torch.randn(2, 4, site.hidden)
    neurons = nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)  # (2, 4, I)
    layer = DomainFFN(mlp, site)
    adapter = fill(DomainAdapter(spec_for(site, "bottleneck", "neurons")))
    layer.add("pubmed", adapter)
    assert torch.allclose(layer(x), mlp(x) + adapter(neurons), atol=1e-5)
    assert not mlp.down_proj._forward_pre_hooks


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("layout", ["S1A2E5", "S0A2E4", "S3A0E3"])
def test_active_neurons_of_a_sparse_ffn_in_packed_order(layout: str, gated: bool) -> None:
    ffn = lone_ffn(layout=layout, gated=gated, biased=True)
    x = torch.randn(2, 7, 12)
    neurons = ffn.active_neurons(x)  # (2, 7, I)
    cut = ffn.spec.layout
    assert neurons.shape == (2, 7, cut.slices * 4)
    parts = [] if ffn.shared is None else [ffn.shared.down_proj.weight]
    if ffn.experts is not None:
        parts += list(ffn.experts.down_proj)
        _, chosen = ffn.router(x.view(-1, 12))
        routed = neurons.view(14, cut.slices, 4)[:, cut.shared :]  # (T, R, W)
        on = torch.zeros(14, cut.routed, dtype=torch.bool).scatter(1, chosen, True)
        assert (routed.abs().sum(-1) > 0).eq(on).all()
        assert torch.isfinite(reference(x.view(-1, 12), chosen, None, ffn.experts.packed())).all()
    assert torch.allclose(neurons @ torch.cat(parts, 1).T + ffn.bias, ffn(x), atol=1e-5)


def test_fixed_weights_scale_each_domain() -> None:
    model = tiny_model("llama")
    site = find_sites(model)[0]
    mlp, x = get(model, site), torch.randn(3, site.hidden)
    layer = DomainFFN(mlp, site)
    one, two = (fill(DomainAdapter(spec_for(site, "ffn", "input")), seed) for seed in (1, 2))
    layer.add("one", one, 0.5)
    layer.add("two", two)
    assert torch.allclose(layer(x), mlp(x) + 0.5 * one(x) + two(x), atol=1e-5)
    layer.activate(["two"])
    assert torch.allclose(layer(x), mlp(x) + two(x), atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 1), (6,)])
def test_batch_1_keeps_its_dimensions(shape: tuple[int, ...]) -> None:
    """Defect 5 of the released code: `.squeeze()` dropped the batch dimension at batch 1."""
    site = find_sites(tiny_model("llama"))[0]
    for base in (get(tiny_model("llama"), site), lone_ffn(32, 16, "S1A1E4")):
        layer = DomainFFN(base, site)
        for form, reads in FORMS:
            layer.add(f"{form}-{reads}", fill(DomainAdapter(spec_for(site, form, reads))))
        x = torch.randn(*shape, site.hidden)
        assert layer(x).shape == x.shape
        assert torch.allclose(layer(x).view(-1, 32)[0], layer(x.view(-1, 32)[:1])[0], atol=1e-5)


def test_computes_in_float32_beside_a_bfloat16_ffn() -> None:
    model = tiny_model("llama").bfloat16()
    site = find_sites(model)[0]
    layer = DomainFFN(get(model, site), site)
    layer.add("pubmed", fill(DomainAdapter(spec_for(site, "ffn", "input"))))
    x = torch.randn(2, 3, site.hidden, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16 and layer.mixda_adapters["pubmed"].in_proj.dtype == torch.float32


def test_what_cannot_be_is_refused() -> None:
    site = find_sites(tiny_model("llama"))[0]
    with pytest.raises(FactorMixError, match="goes with form 'bottleneck'"):
        spec_for(site, "ffn", "neurons")
    with pytest.raises(FactorMixError, match="unknown adapter form 'lora'; allowed: 'ffn', 'bottleneck'"):
        spec_for(site, "lora", "input")
    with pytest.raises(FactorMixError, match="width received 0"):
        spec_for(site, "ffn", "input", 0)
    layer = DomainFFN(lone_ffn(32, 16, "S1A1E4"), site)
    assert isinstance(layer.base_layer, SparseFFN)
    layer.add("pubmed", DomainAdapter(spec_for(site, "ffn", "input")))
    with pytest.raises(FactorMixError, match="has an adapter here already"):
        layer.add("pubmed", DomainAdapter(spec_for(site, "ffn", "input")))
    with pytest.raises(FactorMixError, match="unknown domain 'pubmad'; allowed: 'pubmed'. Did you mean 'pubmed'"):
        layer.activate(["pubmad"])
