"""Assembly moves the dense FFN's own numbers: each neuron's gate, up, down and biases stay together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from factormix.factor.assemble import assemble, sparse_spec
from factormix.factor.partition import Assignment
from factormix.ffn import FFNWeights, find_sites, weights
from factormix.nn import Layout, SparseSpec
from factormix.run.errors import FactorMixError
from tests.families import TINY, tiny_model
from tests.nn.sparse import random_assignment


@st.composite
def cases(draw: st.DrawFn) -> tuple:
    """Weights with any of the biases, of odd sizes, and a layout."""
    slices, width, hidden = draw(st.integers(1, 8)), draw(st.integers(1, 7)), draw(st.integers(1, 19))
    shared = draw(st.integers(0, slices))
    layout = Layout(shared, slices - shared, slices)  # all on
    g, inner = torch.Generator().manual_seed(draw(st.integers(0, 999))), slices * width
    gated = draw(st.booleans())
    up, down, gate = torch.randn(3, inner, hidden, generator=g) / hidden**0.5
    biases = {name: draw(st.booleans()) for name in ("up_bias", "gate_bias", "down_bias")}
    parts = FFNWeights(
        up=up,
        down=down,
        gate=gate if gated else None,
        up_bias=torch.randn(inner, generator=g) if biases["up_bias"] else None,
        gate_bias=torch.randn(inner, generator=g) if biases["gate_bias"] and gated else None,
        down_bias=torch.randn(hidden, generator=g) if biases["down_bias"] else None,
    )
    spec = SparseSpec(
        hidden=hidden,
        width=width,
        shared=shared,
        active=layout.active,
        slices=slices,
        activation="silu" if gated else "gelu",
        gated=gated,
        up_bias=parts.up_bias is not None or parts.gate_bias is not None,
        down_bias=parts.down_bias is not None,
    )
    return parts, spec, random_assignment(inner, layout, draw(st.integers(0, 99)))


@settings(max_examples=80, deadline=None)
@given(cases(), st.integers(1, 9))
def test_all_on_is_the_dense_ffn(case: tuple, count: int) -> None:
    parts, spec, assignment = case
    ffn = assemble(spec, parts, assignment).eval()
    act = torch.nn.functional.silu if spec.gated else torch.nn.functional.gelu
    x = torch.randn(count, spec.hidden, generator=torch.Generator().manual_seed(1))
    want = parts.forward(x, act)
    with torch.no_grad():
        assert float((ffn(x) - want).norm()) <= 1e-5 * max(1.0, float(want.norm()))


@settings(max_examples=40, deadline=None)
@given(cases())
def test_every_number_is_where_the_assignment_says(case: tuple) -> None:
    parts, spec, assignment = case
    ffn = assemble(spec, parts, assignment)
    width = spec.width

    def rows(neurons: Tensor, gate: Tensor | None, up: Tensor | None) -> Tensor:
        return torch.cat([t[neurons] for t in (gate, up) if t is not None])

    for i, neurons in enumerate(assignment.experts):
        packed = ffn.experts.packed()
        assert torch.equal(packed.up[i], rows(neurons, parts.gate, parts.up))
        assert torch.equal(packed.down[i].T, parts.down[neurons])
        if parts.up_bias is not None and packed.up_bias is not None:
            assert torch.equal(packed.up_bias[i][-width:], parts.up_bias[neurons])
        elif packed.up_bias is not None:
            assert not packed.up_bias[i][-width:].any()  # only the gate had a bias
    if ffn.shared is not None:
        assert torch.equal(ffn.shared.up_proj.weight, rows(assignment.shared, parts.gate, parts.up))
        assert torch.equal(ffn.shared.down_proj.weight.T, parts.down[assignment.shared])
    if ffn.router is not None:
        assert not ffn.router.weight.any()
    if parts.down_bias is not None:
        assert torch.equal(ffn.bias, parts.down_bias)
    neurons = (3 if spec.gated else 2) * parts.up.numel() + spec.up_bias * (1 + spec.gated) * len(parts.up)
    router = spec.hidden * spec.layout.routed
    assert sum(p.numel() for p in ffn.parameters()) == neurons + router + spec.down_bias * spec.hidden


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "bert", "opt", "modernbert-bias", "t5-plain"])
def test_nothing_of_the_dense_model_is_shared_or_changed(family: str) -> None:
    model = tiny_model(family)
    site = find_sites(model)[0]
    parts = weights(model, site)
    before = {name: None if w is None else w.clone() for name, w in vars(parts).items()}
    layout = Layout.parse("S1A2E4")
    ffn = assemble(sparse_spec(site, layout, "hard"), parts, random_assignment(site.inner, layout))
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for parameter in ffn.parameters():
        assert parameter.untyped_storage().data_ptr() not in owned
        assert parameter.requires_grad and parameter.is_contiguous() and not parameter.is_meta
        parameter.data.fill_(7.0)
    for name, tensor in before.items():
        assert tensor is None or torch.equal(getattr(parts, name), tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_is_the_dense_one(dtype: torch.dtype) -> None:
    model = tiny_model("gpt2").to(dtype)
    site = find_sites(model)[0]
    layout = Layout.parse("S1A2E4")
    ffn = assemble(sparse_spec(site, layout, "hard"), weights(model, site), random_assignment(64, layout))
    assert {p.dtype for p in ffn.parameters()} == {dtype}
    with torch.no_grad():
        assert ffn(torch.randn(9, 32).to(dtype)).dtype == dtype


@pytest.mark.parametrize("family", TINY)
def test_the_spec_is_the_sites(family: str) -> None:
    for site in find_sites(tiny_model(family)):
        spec = sparse_spec(site, Layout.parse("S1A2E4"), "paper")
        assert (spec.hidden, spec.width, spec.output_weight) == (site.hidden, site.inner // 4, "paper")
        assert (spec.gated, spec.activation, spec.down_bias) == (site.gated, site.activation, site.down_bias)
        assert spec.up_bias == (site.up_bias or site.gate_bias) and spec.layout == Layout(1, 2, 4)


def test_sizes_that_do_not_divide_are_refused() -> None:
    site = find_sites(tiny_model("llama"))[0]
    with pytest.raises(FactorMixError, match="64 neurons does not divide into E = 7"):
        sparse_spec(site, Layout.parse("S1A2E7"), "hard")


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # without and with an output bias
def test_the_compensation_of_dropped_neurons_joins_the_output_bias(family: str) -> None:
    model = tiny_model(family)
    site = find_sites(model)[0]
    parts, lost = weights(model, site), torch.arange(site.hidden).float()
    kept, dropped = torch.arange(site.inner).chunk(2)
    layout = Layout(2, 0, 4)
    assignment = Assignment.without_experts(kept, dropped, layout.width(site.inner), lost)
    ffn = assemble(sparse_spec(site, layout, "hard", compensated=True), parts, assignment)
    assert torch.equal(ffn.bias, lost + (0 if parts.down_bias is None else parts.down_bias))
