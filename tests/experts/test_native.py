"""The C++ operator gives what the reference gives, over shapes, kinds and dtypes; and steps aside where it must."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from factormix.experts import PackedExperts, dispatch, native
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


@settings(max_examples=150, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_it_is_the_reference(data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    draw = data.draw
    tokens, hidden, width = draw(st.integers(1, 4)), draw(st.integers(1, 130)), draw(st.integers(1, 70))
    routed = draw(st.integers(1, 9))
    active, gated, bias = draw(st.integers(1, routed)), draw(st.booleans()), draw(st.booleans())
    act, dtype = draw(st.sampled_from(list(native.ACTIVATIONS))), draw(st.sampled_from(native.DTYPES))
    x = torch.randn(tokens, hidden).to(dtype)
    experts = pack(routed, width, hidden, gated, bias, act, dtype) if draw(st.booleans()) else None
    shared = pack(1, 2 * width, hidden, gated, bias, act, dtype) if experts is None or draw(st.booleans()) else None
    chosen = torch.rand(tokens, routed).topk(active, 1).indices if experts is not None else None
    scale = torch.rand(tokens, active).to(dtype) if experts is not None and draw(st.booleans()) else None
    got = native.decode(x, chosen, scale, experts, shared)
    want = torch.zeros(tokens, hidden)
    if experts is not None and chosen is not None:
        want += reference(x.float(), chosen, None if scale is None else scale.float(), plain(experts))
    if shared is not None:
        want += reference(x.float(), torch.zeros(tokens, 1, dtype=torch.int64), None, plain(shared))
    assert got.dtype == dtype and got.shape == (tokens, hidden)
    assert float((got.float() - want).norm() / want.norm().clamp_min(1e-6)) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_two_threads_give_the_same_numbers() -> None:
    parts, x = pack(8, 96, 576, True, False, "silu", torch.float32), torch.randn(3, 576)
    chosen = torch.rand(3, 8).topk(4, 1).indices
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
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each call of the operator."""
    seen: list[int] = []
    real = native.decode

    def counted(x: Tensor, *rest: object) -> Tensor:
        seen.append(len(x))
        return real(x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(native, "decode", counted)
    return seen


@pytest.mark.parametrize("tokens", [1, 4, 5])
@pytest.mark.parametrize("layout", ["S1A2E5", "S0A2E4", "S4A0E4"])
def test_a_sparse_ffn_decodes_with_it_and_prefills_without(calls: list[int], layout: str, tokens: int) -> None:
    ffn, x = lone_ffn(layout=layout, biased=True), torch.randn(5, 12)
    with torch.no_grad():
        want = ffn(x)[:tokens]
        assert not calls
        assert torch.allclose(ffn(x[:tokens]), want, rtol=1e-5, atol=1e-6)
    assert calls == ([tokens] if tokens <= 4 else [])


def _adapter(ffn: SparseFFN) -> None:
    class Adapted(nn.Linear):
        pass

    ffn.shared.up_proj.__class__ = Adapted


TOUCHED = {
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
def test_it_steps_aside(calls: list[int], what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all parts at once; `run_experts` may still run the experts alone on it, behind what was put there."""
    monkeypatch.setattr(dispatch, "native", SimpleNamespace(serves=lambda *_: False))
    ffn = lone_ffn()
    TOUCHED[what](ffn)
    with torch.no_grad():
        ffn(torch.randn(2, 12, dtype=torch.float64 if what == "another dtype" else torch.float32))
    assert not calls


def test_it_steps_aside_for_gradients_and_autocast(calls: list[int]) -> None:
    ffn, x = lone_ffn(), torch.randn(2, 12)
    ffn(x).sum().backward()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
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
    monkeypatch.setattr(native, "SOURCE", broken)
    monkeypatch.setenv("FACTORMIX_CACHE", str(tmp_path))
    with pytest.warns(UserWarning, match="was not built"):
        assert native.library.__wrapped__() is None
    assert not list((tmp_path / "native").glob("*.so"))
