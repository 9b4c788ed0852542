"""PyTorch's grouped product against the reference, on a CPU, where it takes the same operands as on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from factormix.experts import PackedExperts, dispatch, grouped_mm, native
from factormix.experts.reference import reference
from tests.experts.test_paths import packed, relative, to, tokens


@st.composite
def cases(draw: st.DrawFn) -> tuple:
    """(experts, x, chosen, scale) of any shape whose rows are multiples of 16 bytes."""
    routed = draw(st.integers(1, 9))
    active = draw(st.integers(1, routed))
    width, hidden = 8 * draw(st.integers(1, 3)), 8 * draw(st.integers(1, 3))
    seed = draw(st.integers(0, 999))
    experts = packed(routed, width, hidden, draw(st.booleans()), draw(st.booleans()), seed)
    return experts, *tokens(draw(st.integers(1, 70)), hidden, routed, active, draw(st.booleans()), seed)


@settings(max_examples=40, deadline=None)
@given(case=cases(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_it_equals_the_reference(case: tuple, dtype: torch.dtype) -> None:
    experts, x, chosen, scale = case
    with torch.no_grad():
        got = grouped_mm.grouped_mm(x.to(dtype), chosen, scale, to(experts, dtype))
    assert got.dtype == dtype and got.shape == x.shape and got.is_contiguous()
    want = reference(x, chosen, scale, experts)
    assert float((got.float() - want).norm()) <= (2e-6 if dtype == torch.float32 else 2e-2) * max(1, float(want.norm()))


@settings(max_examples=30, deadline=None)
@given(cases())
def test_its_gradients_are_the_references(case: tuple) -> None:
    experts, x, chosen, scale = case
    leaves = (x, scale, experts.up, experts.down, experts.up_bias)
    found = []
    for path in (grouped_mm.grouped_mm, reference):
        x_, scale_, up, down, bias = (None if t is None else t.clone().requires_grad_() for t in leaves)
        view = PackedExperts(up, down, bias, experts.activation, experts.gated)  # type: ignore[arg-type]
        out = path(x_, chosen, scale_, view)  # type: ignore[operator]
        found.append(torch.autograd.grad(out.sum(), [t for t in (x_, scale_, up, down, bias) if t is not None]))
    for got, want in zip(*found, strict=True):
        assert float((got - want).norm()) <= 1e-5 * max(1.0, float(want.norm()))


def test_an_expert_without_tokens_has_a_gradient_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """On some GPUs the product leaves it as the memory was."""
    real = grouped_mm._product

    def unset(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
        out = real(left, right, ends)
        return out if out.dim() == 2 else out.masked_fill((out == 0).all((1, 2), keepdim=True), torch.nan)

    monkeypatch.setattr(grouped_mm, "_product", unset)
    experts, (x, _, _) = packed(5, 8, 8, True, False), tokens(6, 8, 5, 2, False)
    up, down = experts.up.requires_grad_(), experts.down.requires_grad_()
    out = grouped_mm.grouped_mm(x, torch.tensor([[3, 1]]).expand(6, 2), None, experts)
    for grad in torch.autograd.grad(out.square().sum(), [up, down]):
        assert [bool(g.any()) for g in grad] == [False, True, False, True, False] and grad.isfinite().all()


def test_experts_nobody_chose_do_not_run() -> None:
    experts, (x, _, _) = packed(5, 8, 8, gated=True, biased=True), tokens(6, 8, 5, 2, False)
    chosen = torch.tensor([[3, 1]]).expand(6, 2)
    want = reference(x, chosen, None, experts)
    for tensor in (experts.up, experts.down, experts.up_bias):
        tensor[[0, 2, 4]] = torch.nan
    assert relative(grouped_mm.grouped_mm(x, chosen, None, experts), want) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_float32_weights_under_bfloat16_states(dtype: torch.dtype) -> None:
    """Training under autocast: the gradient arrives in the weights' dtype."""
    experts, (x, chosen, scale) = packed(4, 8, 16, True, True), tokens(9, 16, 4, 2, True)
    experts.up.requires_grad_()
    got = grouped_mm.grouped_mm(x.to(dtype), chosen, scale, experts)
    got.float().sum().backward()
    assert got.dtype == dtype and experts.up.grad is not None and experts.up.grad.dtype == torch.float32
    assert relative(got.detach().float(), reference(x, chosen, scale, experts).detach()) < 2e-2


@pytest.mark.parametrize("hidden, width, good", [(16, 8, True), (12, 8, False), (16, 4, False)])
def test_rows_that_are_not_multiples_of_16_bytes_are_seen(hidden: int, width: int, good: bool) -> None:
    x = torch.zeros(2, hidden, dtype=torch.bfloat16)
    assert grouped_mm.aligned(x, to(packed(3, width, hidden, False, False), torch.bfloat16)) is good


def test_a_view_that_begins_between_is_seen() -> None:
    up = torch.zeros(2 * 8 * 16 + 1, dtype=torch.bfloat16)[1:].view(2, 8, 16)
    experts = PackedExperts(up, torch.zeros(2, 16, 8, dtype=torch.bfloat16), None, "relu", False)
    assert not grouped_mm.aligned(torch.zeros(2, 16, dtype=torch.bfloat16), experts)


def test_it_is_for_gpus_and_dispatch_asks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = to(packed(4, 8, 16, True, False), torch.bfloat16)
    x, chosen, scale = tokens(20, 16, 4, 2, True)
    assert not grouped_mm.serves(x.bfloat16(), experts)
    calls = []
    real = grouped_mm.grouped_mm
    monkeypatch.setattr(native, "most_tokens", lambda: 0)
    monkeypatch.setattr(grouped_mm, "serves", lambda *_: True)
    monkeypatch.setattr(grouped_mm, "grouped_mm", lambda *a: (calls.append(len(a[0])), real(*a))[1])
    with torch.no_grad():
        dispatch.run_experts(x.bfloat16(), chosen, scale, experts)
    assert calls == [20]


def test_it_compiles_with_gradients_and_no_graph_break() -> None:
    torch._dynamo.reset()
    experts, (x, chosen, scale) = packed(4, 8, 16, True, True), tokens(9, 16, 4, 2, True)
    experts, x = to(experts, torch.bfloat16), x.bfloat16()
    leaves = [x.requires_grad_(), experts.up.requires_grad_(), experts.down.requires_grad_()]
    found = []
    for run in (grouped_mm.grouped_mm, torch.compile(grouped_mm.grouped_mm, backend="eager", fullgraph=True)):
        found.append(torch.autograd.grad(run(x, chosen, scale, experts).square().sum(), leaves))
    for got, want in zip(*found, strict=True):
        assert relative(got.float(), want.float()) < 1e-2
