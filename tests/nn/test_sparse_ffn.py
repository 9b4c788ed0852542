"""SparseFFN: rows alone or in any batch, the gates, what it costs, and the gradient that reaches the router."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from factormix.experts import native
from factormix.experts.reference import reference
from factormix.nn import SparseFFN, SparseSpec
from factormix.run.errors import FactorMixError
from tests.nn.sparse import lone_ffn

GATES = ["hard", "paper", "soft"]


def by_reference(ffn: SparseFFN, x: Tensor) -> Tensor:
    """The module's equation, through the judge: x (T, H) -> (T, H)."""
    out = torch.zeros_like(x)
    if ffn.shared is not None:
        out = out + ffn.shared(x)
    if ffn.router is not None and ffn.experts is not None:
        scores, chosen = ffn.router(x)
        scale = {
            "hard": torch.ones_like(chosen),
            "paper": torch.ones_like(chosen) * ffn.spec.slices / ffn.spec.active,
            "soft": scores.gather(1, chosen).sigmoid(),
        }[ffn.spec.output_weight]
        out = out + reference(x, chosen, scale, ffn.experts.packed())
    return out if ffn.bias is None else out + ffn.bias


@st.composite
def ffns(draw: st.DrawFn) -> SparseFFN:
    """Any FFN, odd sizes included."""
    slices = draw(st.integers(1, 9))
    shared = draw(st.integers(0, slices))
    active = draw(st.integers(1, slices - shared)) if shared < slices else 0
    sizes = draw(st.integers(1, 33)), draw(st.integers(1, 11))
    flags = draw(st.booleans()), draw(st.booleans())
    return lone_ffn(
        *sizes, f"S{shared}A{active}E{slices}", *flags, draw(st.sampled_from(GATES)), draw(st.integers(0, 99))
    )


@settings(max_examples=80, deadline=None)
@given(ffns(), st.integers(1, 40), st.integers(0, 39))
def test_a_row_alone_or_in_any_batch(ffn: SparseFFN, count: int, place: int) -> None:
    x = torch.randn(count, ffn.spec.hidden, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        together = ffn(x)
        alone = ffn(x[place % count])
        reshaped = ffn(x.view(1, count, 1, -1))
        want = by_reference(ffn, x)
    bound = 1e-5 * max(1.0, float(want.norm(dim=1).max()))
    assert float((together - want).norm(dim=1).max()) <= bound
    assert float((alone - together[place % count]).norm()) <= bound
    assert alone.shape == (ffn.spec.hidden,) and reshaped.shape == (1, count, 1, ffn.spec.hidden)
    assert torch.equal(reshaped.view_as(together), together)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("layout", ["S1A2E5", "S0A1E4", "S2A3E5", "S3A0E3"])
@pytest.mark.parametrize("count", [5, 32])
def test_flops_are_the_active_fractions(layout: str, gated: bool, count: int) -> None:
    ffn = lone_ffn(12, 4, layout, gated)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ffn(torch.randn(count, 12))
    dense = count * 2 * (3 if gated else 2) * 12 * 4 * ffn.spec.slices
    router = count * 2 * 12 * ffn.spec.layout.routed
    assert counter.get_total_flops() == dense * ffn.spec.layout.active_fraction + router


def test_active_parameters_are_those_one_token_uses() -> None:
    ffn = lone_ffn(12, 4, "S1A2E5", biased=True)
    neuron = 3 * 12 + 2
    assert ffn.active_parameters() == 3 * 4 * neuron + 4 * 12 + 12
    assert lone_ffn(12, 4, "S3A0E3").active_parameters() == 3 * 4 * 36


@pytest.mark.parametrize("layout, factor", [("S0A3E4", 4 / 3), ("S0A2E4", 2.0), ("S0A1E4", 4.0), ("S0A4E4", 1.0)])
@pytest.mark.parametrize("train", [False, True])
def test_the_papers_gate_is_not_truncated(layout: str, factor: float, train: bool) -> None:
    """Defect 7: N // K scaled 3 of 4 by 1."""
    hard, paper = lone_ffn(layout=layout), lone_ffn(layout=layout, output_weight="paper").train(train)
    x = torch.randn(6, 12)
    assert torch.allclose(paper(x), factor * hard(x), rtol=1e-5, atol=1e-6)
    scores, chosen = paper.router(x)
    assert torch.allclose(paper.scale(scores, chosen), torch.full(chosen.shape, factor))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("weighted", [True, False])
def test_while_training_the_value_is_the_same_and_the_router_learns(gate: str, weighted: bool) -> None:
    ffn, x = lone_ffn(output_weight=gate), torch.randn(9, 12)
    with torch.no_grad():
        want = ffn(x)
    ffn.train()
    out = ffn(x)
    bound = 1e-5 * want.norm(dim=1).clamp(min=1.0)  # (T,): the two add up in another order
    assert bool(((out - want).norm(dim=1) <= bound).all())
    (out * torch.randn(9, 12) if weighted else out.square()).sum().backward()
    assert float(ffn.router.weight.grad.norm()) > 1e-4
    assert all(float(p.grad.norm()) > 0 for p in ffn.parameters())


def test_the_gradient_of_the_gate_is_the_sigmoids() -> None:
    """d out / d z_i = sigmoid'(z_i) E_i(x) for the chosen, 0 for the others."""
    ffn, x, weight = lone_ffn(layout="S1A2E6").train(), torch.randn(1, 12), torch.randn(12)
    (ffn(x)[0] @ weight).backward()
    with torch.no_grad():
        scores, chosen = ffn.router(x)
        p = scores[0].sigmoid()
        for i in range(5):
            slope = p[i] * (1 - p[i]) * (ffn.experts.packed().run(i, x)[0] @ weight)
            want = slope * x[0] if i in chosen[0] else torch.zeros(12)
            assert torch.allclose(ffn.router.weight.grad[i], want, atol=1e-5)


def test_evaluation_mode_has_no_gate_in_the_way() -> None:
    ffn = lone_ffn()
    scores, chosen = ffn.router(torch.randn(3, 12))
    assert ffn.scale(scores, chosen) is None
    ffn.train()
    with torch.no_grad():
        assert ffn.scale(scores, chosen) is None
    assert ffn.scale(scores, chosen).requires_grad


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 9])
def test_half_precision(gate: str, dtype: torch.dtype, count: int) -> None:
    ffn, x = lone_ffn(output_weight=gate, biased=True).to(dtype), torch.randn(count, 12).to(dtype)
    with torch.no_grad():
        out = ffn(x)
        want = by_reference(ffn.float(), x.float())  # the same rounded weights and rows: no choice can flip
    assert out.dtype == dtype
    assert float((out.float() - want).norm() / want.norm()) < 2e-2


@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("train", [True, False])
def test_under_autocast(count: int, train: bool) -> None:
    ffn, x = lone_ffn(biased=True).train(train), torch.randn(count, 12)
    with torch.set_grad_enabled(train):
        want = ffn(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = ffn(x)
    assert float((got.float() - want).detach().norm() / want.detach().norm()) < 2e-2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("layout", ["S1A2E5", "S0A1E4", "S3A0E3"])
def test_torch_compile_without_graph_breaks(backend: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "most_tokens", lambda: 0)  # PyTorch's operators on both sides: the bound is theirs
    torch._dynamo.reset()
    ffn = lone_ffn(layout=layout, biased=True)
    compiled = torch.compile(ffn, backend=backend, fullgraph=True)
    with torch.no_grad():
        for count in (1, 3, 17):
            x = torch.randn(count, 12)
            assert torch.allclose(compiled(x), ffn(x), rtol=1e-6, atol=1e-6)


def test_torch_compile_with_gradients() -> None:
    torch._dynamo.reset()
    ffn, x = lone_ffn().train(), torch.randn(9, 12)
    found = []
    for run in (ffn, torch.compile(ffn, backend="eager")):
        found.append(torch.autograd.grad(run(x).square().sum(), list(ffn.parameters())))
    for got, want in zip(*found, strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


def test_torch_compile_under_autocast() -> None:
    torch._dynamo.reset()
    ffn = lone_ffn(biased=True)
    compiled = torch.compile(ffn, backend="aot_eager")
    for count in (1, 9):
        x = torch.randn(count, 12)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.allclose(compiled(x).float(), ffn(x).float(), rtol=1e-2, atol=1e-2)


def test_an_unknown_gate_is_refused() -> None:
    with pytest.raises(FactorMixError, match="unknown output_weight 'papr'.*Did you mean 'paper'"):
        SparseSpec(8, 4, 0, 1, 2, "silu", True, output_weight="papr")  # type: ignore[arg-type]


def test_the_spec_survives_json() -> None:
    spec = lone_ffn(biased=True, output_weight="soft").spec
    assert SparseSpec.from_dict(spec.to_dict()) == spec


def test_an_older_config_calls_the_output_weight_gate() -> None:
    spec = lone_ffn(output_weight="soft").spec
    older = spec.to_dict()
    older["gate"] = older.pop("output_weight")
    assert SparseSpec.from_dict(older) == spec
