"""The C++ operator gives what the reference gives, over shapes, kinds and dtypes; and steps aside where it must."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from factormix.experts import PackedExperts, native, run_experts
from factormix.experts.reference import reference
from factormix.nn import SparseFFN
from factormix.run.errors import FactorMixError
from tests.nn.sparse import lone_ffn

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler here")


def pack(routed: int, width: int, hidden: int, gated: bool, bias: bool, act: str, dtype: torch.dtype) -> PackedExperts:
    rows = (2 if gated else 1) * width
    up = torch.randn(routed, rows, hidden) / hidden**0.5
    down = torch.randn(routed, hidden, width) / width**0.5
    return PackedExperts(
        up.to(dtype), down.to(dtype), torch.randn(routed, rows).to(dtype) if bias else None, act, gated
    )


def plain(parts: PackedExperts) -> PackedExperts:
    bias = None if parts.up_bias is None else parts.up_bias.float()
    return PackedExperts(parts.up.float(), parts.down.float(), bias, parts.activation, parts.gated)


LEVELS = range(native.library().factormix_level(-1) + 1 if native.library() else 0)  # instruction sets that run here


@pytest.fixture(autouse=True)
def _no_gradients_one_seed() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@contextmanager
def level(wanted: int) -> Iterator[None]:
    """Another instruction set for a while."""
    built = native.library()
    was = built.factormix_level(-1)
    assert built.factormix_level(wanted) == wanted
    try:
        yield
    finally:
        built.factormix_level(was)


@pytest.mark.parametrize("at", LEVELS)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_it_is_the_reference(at: int, data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    draw = data.draw
    tokens = draw(st.one_of(st.integers(1, 8), st.integers(9, 150)))
    hidden, width = draw(st.integers(1, 130)), draw(st.integers(1, 70))
    if draw(st.booleans()):  # pairs of bfloat16 are multiplied as such
        hidden, width = hidden + hidden % 2, width + width % 2
    routed = draw(st.integers(1, 9))
    active, gated, bias = draw(st.integers(1, routed)), draw(st.booleans()), draw(st.booleans())
    act, dtype = draw(st.sampled_from(list(native.ACTIVATIONS))), draw(st.sampled_from(list(native.DTYPES)))
    x = torch.randn(tokens, hidden).to(dtype)
    experts = pack(routed, width, hidden, gated, bias, act, dtype) if draw(st.booleans()) else None
    shared = pack(1, 2 * width, hidden, gated, bias, act, dtype) if experts is None or draw(st.booleans()) else None
    chosen = torch.rand(tokens, routed).topk(active, 1).indices if experts is not None else None
    scale = torch.rand(tokens, active).to(dtype) if experts is not None and draw(st.booleans()) else None
    with level(at):
        got = native.decode(x, chosen, scale, experts, shared)
    want = torch.zeros(tokens, hidden)
    if experts is not None and chosen is not None:
        want += reference(x.float(), chosen, None if scale is None else scale.float(), plain(experts))
    if shared is not None:
        want += reference(x.float(), torch.zeros(tokens, 1, dtype=torch.int64), None, plain(shared))
    assert got.dtype == dtype and got.shape == (tokens, hidden)
    assert float((got.float() - want).norm() / want.norm().clamp_min(1e-6)) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("at", LEVELS)
def test_choices_given_from_outside_hold_for_more_tokens_than_are_grouped_at_a_time(at: int) -> None:
    torch.manual_seed(0)
    x, experts = torch.randn(1100, 8), pack(5, 4, 8, True, False, "silu", torch.float32)
    chosen, scale = torch.rand(1100, 5).topk(2, 1).indices, torch.rand(1100, 2)
    with level(at):
        got = native.decode(x, chosen, scale, experts, None)
    assert torch.allclose(got, reference(x, chosen, scale, plain(experts)), atol=1e-5)


@pytest.mark.parametrize("at", LEVELS)
def test_activations_are_those_of_pytorch(at: int) -> None:
    """Of single numbers, far ones too: with unit weights the output is the activation of x."""
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([0.0, 1e-30, -1e-30, 1e30, -1e30])])[:, None]  # (T, 1)
    for act in native.ACTIVATIONS:
        parts = PackedExperts(torch.ones(1, 1, 1), torch.ones(1, 1, 1), None, act, False)
        with level(at):
            got = native.decode(x, None, None, None, parts)
        assert torch.allclose(got, parts.act(x), rtol=1e-5, atol=2e-6), act


@pytest.mark.parametrize("at", LEVELS)
def test_nan_stays_nan_and_with_its_token(at: int) -> None:
    for dtype in native.DTYPES:
        parts, x = pack(4, 16, 32, True, False, "silu", dtype), torch.randn(20, 32).to(dtype)
        x[3] = torch.nan
        for tokens in (5, 20):
            with level(at):
                y = native.decode(x[:tokens], torch.rand(tokens, 4).topk(2, 1).indices, None, parts, None)
            assert y.isnan().all(1).nonzero().flatten().tolist() == [3] == y.isnan().any(1).nonzero().flatten().tolist()


@pytest.mark.parametrize("at", LEVELS)
@pytest.mark.parametrize("tokens, hidden", [(3, 32), (40, 32), (3, 37), (40, 37)])
def test_bfloat16_outputs_are_rounded_as_pytorch_rounds(at: int, tokens: int, hidden: int) -> None:
    """Each output is a sum of two inputs, exact in float32."""
    x, eye = torch.rand(tokens, hidden).bfloat16(), torch.eye(hidden).bfloat16()
    parts = PackedExperts(eye[None], (eye + eye.roll(1, 0))[None], None, "relu", False)
    with level(at):
        y = native.decode(x, None, None, None, parts)
    assert torch.equal(y, (x.float() + x.float().roll(1, 1)).bfloat16())


@pytest.mark.parametrize("at", LEVELS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_router_is_pytorchs(at: int, data: st.DataObject) -> None:
    """Scores to float32 rounding; choices exactly, those of ties and of NaN included."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6)))
    hidden, routed, tokens = draw(st.integers(1, 70)), draw(st.integers(1, 70)), draw(st.integers(1, 40))
    active = draw(st.integers(1, routed))
    dtype, weights = draw(st.sampled_from(list(native.DTYPES))), draw(st.sampled_from(list(native.DTYPES)))
    x, router = torch.randn(tokens, hidden).to(dtype), torch.randn(routed, hidden).to(weights)
    if draw(st.booleans()):  # ties
        x, router = x.sign(), router.round()
    if draw(st.booleans()):
        router[draw(st.integers(0, routed - 1))] = torch.nan
    with level(at):
        scores, chosen = native.route(x, router, active)
    want = (x.double() @ router.double().T).float()
    assert torch.allclose(scores, want, rtol=1e-6, atol=1e-30, equal_nan=True)
    assert torch.equal(chosen, scores.sort(dim=1, descending=True, stable=True).indices[:, :active])


@pytest.mark.parametrize("dtype", native.DTYPES)
def test_a_token_among_many_is_bit_for_bit_the_same(dtype: torch.dtype) -> None:
    """As long as its experts have more than 8 tokens each, or at most 8: a row is summed in one of two orders."""
    parts, shared = pack(2, 24, 64, True, False, "silu", dtype), pack(1, 48, 64, True, False, "silu", dtype)
    x, chosen = torch.randn(1500, 64).to(dtype), torch.arange(2).expand(1500, 2)
    whole = native.decode(x, chosen, None, parts, shared)
    for begin, end in ((0, 9), (700, 777), (1000, 1100)):
        assert torch.equal(native.decode(x[begin:end], chosen[begin:end], None, parts, shared), whole[begin:end])
    few = native.decode(x[:8], chosen[:8], None, parts, shared)
    assert torch.equal(native.decode(x[2:3], chosen[2:3], None, parts, shared), few[2:3])


def test_the_weights_are_not_copied() -> None:
    parts = pack(8, 128, 512, True, False, "silu", torch.float32)  # 6 MiB
    x, chosen = torch.randn(32, 512), torch.rand(32, 8).topk(2, 1).indices
    with torch.profiler.profile(profile_memory=True) as seen:
        native.decode(x, chosen, None, parts, None)
    assert sum(max(0, event.self_cpu_memory_usage) for event in seen.events()) < 2**18


@pytest.mark.parametrize("tokens", [3, 100])
def test_two_threads_give_the_same_numbers(tokens: int) -> None:
    parts, x = pack(8, 96, 576, True, False, "silu", torch.float32), torch.randn(tokens, 576)
    chosen = torch.rand(tokens, 8).topk(4, 1).indices
    one = native.decode(x, chosen, None, parts, None)
    torch.set_num_threads(2)
    try:
        assert torch.equal(native.decode(x, chosen, None, parts, None), one)
    finally:
        torch.set_num_threads(1)


def test_an_expert_that_does_not_exist_or_comes_twice_is_refused() -> None:
    parts = pack(3, 4, 8, True, False, "silu", torch.float32)
    for row in ([0, 3], [-1, 1], [2, 2]):
        with pytest.raises(FactorMixError, match="of 3: each must exist"):
            native.decode(torch.randn(4, 8), torch.tensor([row] * 4), None, parts, None)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was called of the operator."""
    seen: list[str] = []
    for name in ("decode", "forward"):
        real = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *a, _real=real, _name=name: (seen.append(_name), _real(*a))[1])
    return seen


@pytest.mark.parametrize("gate", ["hard", "paper", "soft"])
@pytest.mark.parametrize("layout", ["S1A2E5", "S0A2E4", "S4A0E4"])
def test_a_sparse_ffn_runs_by_it(calls: list[str], layout: str, gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ffn, x = lone_ffn(layout=layout, biased=True, output_weight=gate), torch.randn(40, 12)
    got = [ffn(x[:tokens]) for tokens in (1, 4, 9, 40)]
    assert calls == ["forward"] * 4
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "most_tokens", lambda: 0)
    for y in got:
        want = ffn(x[: len(y)])
        assert (y - want).norm() < 1e-5 * want.norm()
    assert len(calls) == 4


class Doubled(nn.Linear):
    """Somebody's adapter."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


CHANGED = {
    "another weight": lambda ffn: setattr(ffn.shared.down_proj, "weight", nn.Parameter(torch.randn(12, 4))),
    "other data": lambda ffn: setattr(ffn.experts.down_proj, "data", torch.randn(4, 12, 4)),
    "other data of the shared neurons": lambda ffn: setattr(ffn.shared.down_proj.weight, "data", torch.randn(12, 4)),
    "numbers written in place": lambda ffn: ffn.experts.gate_up_proj.mul_(2),
    "the same memory in another order": lambda ffn: setattr(
        ffn.router.weight, "data", ffn.router.weight.data.view(12, 4).T
    ),
    "a part exchanged": lambda ffn: setattr(ffn, "experts", lone_ffn(seed=3).experts),
    "an adapter": lambda ffn: setattr(ffn.shared, "up_proj", Doubled(12, 8, bias=False)),
    "fewer experts": lambda ffn: setattr(ffn.router, "active", 1),
    "another activation": lambda ffn: [setattr(part, "activation", "relu") for part in (ffn.shared, ffn.experts)],
    "another output weight": lambda ffn: setattr(ffn, "spec", replace(ffn.spec, output_weight="soft")),
    "another dtype": lambda ffn: ffn.double().float(),
}


@pytest.mark.parametrize("what", CHANGED)
def test_what_changes_between_two_calls_is_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ffn, x = lone_ffn(), torch.randn(3, 12)
    before = ffn(x)
    CHANGED[what](ffn)
    got = ffn(x)
    monkeypatch.setattr(native, "most_tokens", lambda: 0)
    monkeypatch.setattr(native, "library", lambda: None)
    assert torch.allclose(got, ffn(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(got, before) == (what == "another dtype")


def test_a_copy_is_its_own() -> None:
    ffn, x = lone_ffn(), torch.randn(3, 12)
    before = ffn(x)
    other = copy.deepcopy(ffn)
    other.experts.down_proj.zero_()
    assert torch.equal(ffn(x), before) and not torch.equal(other(x), before)
    assert torch.equal(pickle.loads(pickle.dumps(ffn))(x), before)


def test_a_hook_on_the_router_is_heard_and_the_rest_is_one_call(calls: list[str]) -> None:
    ffn, x, heard = lone_ffn(), torch.randn(3, 12), []
    want = ffn(x)
    ffn.router.register_forward_hook(lambda module, given, out: heard.append(out))
    assert torch.equal(ffn(x), want) and len(heard) == 1
    assert calls == ["forward", "decode"]


def test_packed_experts_alone_run_by_it(calls: list[str]) -> None:
    parts, x = pack(3, 4, 8, True, False, "silu", torch.float32), torch.randn(20, 8)
    run_experts(x, torch.zeros(20, 1, dtype=torch.int64), None, parts)
    assert calls == ["decode"]


def test_who_counts_operations_sees_them(calls: list[str]) -> None:
    with FlopCounterMode(display=False) as counter:
        lone_ffn()(torch.randn(3, 12))
    assert counter.get_total_flops() and not calls


def _adapter(ffn: SparseFFN) -> None:
    class Adapted(nn.Linear):
        pass

    ffn.shared.up_proj.__class__ = Adapted


class Wrapped(Tensor):
    """A weight that is not what it says: a quantised one, for example."""


TOUCHED = {
    "a weight of another class": lambda ffn: setattr(
        ffn.shared.down_proj, "weight", nn.Parameter(ffn.shared.down_proj.weight.detach().as_subclass(Wrapped))
    ),
    "a hook on the experts": lambda ffn: ffn.experts.register_forward_hook(lambda *_: None),
    "a hook on a projection": lambda ffn: ffn.shared.down_proj.register_forward_pre_hook(lambda *_: None),
    "an adapter": _adapter,
    "a forward of somebody else's": lambda ffn: setattr(ffn.experts, "forward", ffn.experts.forward),
    "another dtype": lambda ffn: ffn.shared.to(torch.float64) and ffn.experts.to(torch.float64),
    "an activation it does not know": lambda ffn: setattr(ffn.experts, "activation", "mish"),
    "weights in another order": lambda ffn: setattr(
        ffn.experts.down_proj, "data", ffn.experts.down_proj.data.transpose(1, 2).contiguous().transpose(1, 2)
    ),
}


@pytest.mark.parametrize("what", TOUCHED)
def test_it_steps_aside(calls: list[str], what: str) -> None:
    ffn = lone_ffn()
    TOUCHED[what](ffn)
    for tokens in (2, 20):
        ffn(torch.randn(tokens, 12, dtype=torch.float64 if what == "another dtype" else torch.float32))
    assert "forward" not in calls  # with all the parts; experts that nobody touched run by `decode` alone


def test_it_steps_aside_for_gradients_and_autocast(calls: list[str]) -> None:
    ffn, x = lone_ffn(), torch.randn(2, 12)
    with torch.enable_grad():
        ffn(x).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        ffn(x)
    assert not calls and ffn.shared.up_proj.weight.grad is not None


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACTORMIX_NATIVE", "0")
    assert native.library.__wrapped__() is None


def test_without_a_compiler_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler"):
        assert native.library.__wrapped__() is None


def test_a_build_that_fails_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    broken = tmp_path / "broken.cpp"
    broken.write_text("this is not C++")
    monkeypatch.setattr(native, "SOURCES", (broken,))
    monkeypatch.setenv("FACTORMIX_CACHE", str(tmp_path))
    with pytest.warns(UserWarning, match="was not built"):
        assert native.library.__wrapped__() is None
    assert not list((tmp_path / "native").glob("*.so"))


@pytest.mark.parametrize(("level", "most"), [(0, native.FEW), (1, sys.maxsize), (3, sys.maxsize)])
def test_below_avx2_it_serves_few_tokens(level: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: SimpleNamespace(factormix_level=lambda _: level))
    assert native.most_tokens.__wrapped__() == most
