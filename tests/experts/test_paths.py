"""Every path against the reference: any number of tokens, experts and sizes, gated or plain, ties and idle experts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from factormix.experts import PackedExperts, dispatch, native, run_experts
from factormix.experts.grouped import grouped
from factormix.experts.packed import activation
from factormix.experts.reference import reference
from factormix.experts.tokenwise import tokenwise

Path = Callable[[Tensor, Tensor, Tensor | None, PackedExperts], Tensor]
PATHS: dict[str, Path] = {"tokenwise": tokenwise, "grouped": grouped, "dispatch": run_experts}
every_path = pytest.mark.parametrize("path", PATHS)

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # relative; of unit roundoffs, about 4


def packed(routed: int, width: int, hidden: int, gated: bool, biased: bool, seed: int = 0) -> PackedExperts:
    generator = torch.Generator().manual_seed(seed)
    rows = (2 if gated else 1) * width
    up = torch.randn(routed, rows, hidden, generator=generator) / hidden**0.5
    down = torch.randn(routed, hidden, width, generator=generator) / width**0.5
    bias = torch.randn(routed, rows, generator=generator) if biased else None
    return PackedExperts(up, down, bias, "silu" if gated else "gelu", gated)


def tokens(count: int, hidden: int, routed: int, active: int, scaled: bool, seed: int = 0) -> tuple:
    """x (T, H), chosen (T, K), scale (T, K) or None."""
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(count, hidden, generator=generator)
    chosen = torch.rand(count, routed, generator=generator).topk(active, dim=1).indices
    scale = torch.rand(count, active, generator=generator) + 0.5 if scaled else None
    return x, chosen, scale


def to(experts: PackedExperts, dtype: torch.dtype) -> PackedExperts:
    bias = None if experts.up_bias is None else experts.up_bias.to(dtype)
    return PackedExperts(experts.up.to(dtype), experts.down.to(dtype), bias, experts.activation, experts.gated)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


@st.composite
def cases(draw: st.DrawFn) -> tuple:
    """(experts, x, chosen, scale) of any shape."""
    routed = draw(st.integers(1, 9))
    active = draw(st.integers(1, routed))
    width, hidden = draw(st.integers(1, 13)), draw(st.integers(1, 17))
    seed = draw(st.integers(0, 999))
    experts = packed(routed, width, hidden, draw(st.booleans()), draw(st.booleans()), seed)
    return experts, *tokens(draw(st.integers(1, 70)), hidden, routed, active, draw(st.booleans()), seed)


def by_hand(experts: PackedExperts, x: Tensor, chosen: Tensor, scale: Tensor | None) -> Tensor:
    """The equation, one token and one expert at a time, without any of the package's own code."""
    out = torch.zeros_like(x)
    width = experts.down.shape[2]
    for t, picks in enumerate(chosen.tolist()):
        for k, i in enumerate(picks):
            projected = experts.up[i] @ x[t] + (0 if experts.up_bias is None else experts.up_bias[i])
            if experts.gated:
                neurons = torch.nn.functional.silu(projected[:width]) * projected[width:]
            else:
                neurons = torch.nn.functional.gelu(projected)
            out[t] += (1 if scale is None else scale[t, k]) * (experts.down[i] @ neurons)
    return out


@settings(max_examples=25, deadline=None)
@given(cases())
def test_the_judge_follows_the_equation(case: tuple) -> None:
    experts, x, chosen, scale = case
    assert relative(reference(x, chosen, scale, experts), by_hand(experts, x, chosen, scale)) < 2e-6


@every_path
@settings(max_examples=60, deadline=None)
@given(case=cases(), grad=st.booleans())
def test_every_path_equals_the_reference(path: str, case: tuple, grad: bool) -> None:
    experts, x, chosen, scale = case
    with torch.set_grad_enabled(grad and path != "tokenwise"):
        got = PATHS[path](x, chosen, scale, experts)
    assert got.shape == x.shape and got.is_contiguous()
    want = reference(x, chosen, scale, experts)
    assert float((got - want).norm()) <= 2e-6 * max(1.0, float(want.norm()))


@every_path
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("scaled", [False, True])
def test_half_precision_stays_near_float32(path: str, dtype: torch.dtype, scaled: bool) -> None:
    experts = packed(6, 24, 32, gated=True, biased=True)
    x, chosen, scale = tokens(40, 32, 6, 3, scaled)
    with torch.no_grad():
        got = PATHS[path](x.to(dtype), chosen, scale, to(experts, dtype))
    assert got.dtype == dtype
    assert relative(got.float(), reference(x, chosen, scale, experts)) < TOLERANCE[dtype]


@every_path
@pytest.mark.parametrize("count", [1, 2, 5, 33])
def test_experts_nobody_chose_do_not_run(path: str, count: int) -> None:
    experts = packed(5, 4, 6, gated=True, biased=True)
    x, _, _ = tokens(count, 6, 5, 2, False)
    chosen = torch.tensor([[3, 1]]).expand(count, 2)  # not contiguous either
    want = reference(x, chosen, None, experts)
    idle = torch.tensor([0, 2, 4])
    for tensor in (experts.up, experts.down, experts.up_bias):
        tensor[idle] = torch.nan  # whoever multiplies them by zero gets NaN
    with torch.no_grad():
        assert relative(PATHS[path](x, chosen, None, experts), want) < 2e-6


@every_path
@pytest.mark.parametrize("count", [1, 3, 12])
def test_views_and_transposes_of_x(path: str, count: int) -> None:
    experts = packed(4, 5, 6, gated=False, biased=False)
    x, chosen, scale = tokens(count, 6, 4, 2, True)
    wide = torch.full((count, 12), torch.nan)
    wide[:, ::2] = x
    with torch.no_grad():
        for view in (x.T.contiguous().T, wide[:, ::2], x[:1].expand(count, 6)):
            got = PATHS[path](view, chosen, scale, experts)
            assert relative(got, reference(view.contiguous(), chosen, scale, experts)) < 2e-6 and got.is_contiguous()


@every_path
def test_no_tokens_give_no_rows(path: str) -> None:
    experts = packed(4, 5, 6, gated=True, biased=False)
    with torch.no_grad():
        out = PATHS[path](torch.empty(0, 6), torch.empty(0, 2, dtype=torch.long), None, experts)
    assert out.shape == (0, 6)


@every_path
def test_the_order_of_the_choice_does_not_matter(path: str) -> None:
    experts = packed(6, 5, 8, gated=True, biased=True)
    x, chosen, scale = tokens(9, 8, 6, 3, True)
    with torch.no_grad():
        one = PATHS[path](x, chosen, scale, experts)
        other = PATHS[path](x, chosen.flip(1), scale.flip(1), experts)
    assert relative(other, one) < 2e-6


@settings(max_examples=30, deadline=None)
@given(cases())
def test_gradients_of_grouped_are_the_references(case: tuple) -> None:
    experts, x, chosen, scale = case
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    leaves = [t for t in (x, scale, experts.up, experts.down, experts.up_bias) if t is not None]
    found = []
    for path in (grouped, reference, run_experts):
        fresh = iter([t.clone().requires_grad_() for t in leaves])
        wired = [None if t is None else next(fresh) for t in (x, scale, experts.up, experts.down, experts.up_bias)]
        view = PackedExperts(wired[2], wired[3], wired[4], experts.activation, experts.gated)  # type: ignore[arg-type]
        loss = (path(wired[0], chosen, wired[1], view) * weight).sum()
        found.append(torch.autograd.grad(loss, [t for t in wired if t is not None]))
    for got, want, dispatched in zip(*found, strict=True):
        assert float((got - want).norm()) <= 1e-5 * max(1.0, float(want.norm()))
        assert torch.equal(dispatched, got)  # with gradients wanted, dispatch never takes the path without


@settings(max_examples=30, deadline=None)
@given(cases())
def test_flops_of_grouped_are_those_of_the_chosen_pairs(case: tuple) -> None:
    experts, x, chosen, scale = case
    with FlopCounterMode(display=False) as counter:
        grouped(x, chosen, scale, experts)
    one = 2 * (experts.up[0].numel() + experts.down[0].numel())
    assert counter.get_total_flops() == chosen.numel() * one


@pytest.mark.parametrize("count, used", [(1, "tokenwise"), (4, "tokenwise"), (5, "grouped")])
def test_dispatch_by_tokens(count: int, used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(dispatch.native, "library", lambda: None)
    for name in ("tokenwise", "grouped"):
        own = PATHS[name]
        monkeypatch.setattr(dispatch, name, lambda *a, _own=own, _name=name: (calls.append(_name), _own(*a))[1])
    monkeypatch.setattr(native, "most_tokens", lambda: 0)
    experts = packed(4, 5, 6, gated=True, biased=False)
    with torch.no_grad():
        run_experts(*tokens(count, 6, 4, 2, False), experts)
    with torch.enable_grad():
        run_experts(*tokens(count, 6, 4, 2, False), experts)
    assert calls == [used, "grouped"]


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler here")
def test_dispatch_decodes_by_the_cpp_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    own = native.decode
    monkeypatch.setattr(native, "decode", lambda *a: (calls.append(len(a[0])), own(*a))[1])
    experts = packed(4, 5, 6, gated=True, biased=False)
    for count in (1, 4, 5):
        with torch.no_grad():
            run_experts(*tokens(count, 6, 4, 2, False), experts)
    assert calls == [1, 4, 5]


@pytest.mark.parametrize("count", [1, 3, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad", [False, True])
def test_under_autocast_a_mix_of_dtypes_runs(count: int, dtype: torch.dtype, grad: bool) -> None:
    experts = packed(4, 5, 6, gated=True, biased=True)
    x, chosen, scale = tokens(count, 6, 4, 2, True)
    with torch.autocast("cpu", dtype=dtype), torch.set_grad_enabled(grad):
        got = run_experts(x.to(dtype), chosen, scale, experts)
    assert relative(got.float(), reference(x, chosen, scale, experts)) < 2e-2


def test_an_activation_is_made_once() -> None:
    assert activation("gelu_new") is activation("gelu_new")


def test_the_custom_operator_is_sound() -> None:
    experts = packed(4, 5, 6, gated=True, biased=True)
    x, chosen, scale = tokens(9, 6, 4, 2, True)
    arguments = (x, chosen, scale, experts.up, experts.down, experts.up_bias, "silu", True)
    torch.library.opcheck(torch.ops.factormix.run_experts, arguments)
