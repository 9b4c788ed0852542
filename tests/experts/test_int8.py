"""Int8 weights give what the same weights widened give, by the C++ operator and by PyTorch; and refuse gradients."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from factormix.experts import PackedExperts, native, run_experts
from factormix.experts.reference import reference
from factormix.nn import Int8Neurons, SparseFFN
from factormix.nn.int8 import rounded
from factormix.run.errors import FactorMixError
from tests.experts.test_native import LEVELS, level, pack
from tests.nn.sparse import lone_ffn

OPERATOR = pytest.mark.skipif(native.library() is None, reason="no C++ compiler here")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


def int8_pack(routed: int, width: int, hidden: int, gated: bool, bias: bool, act: str, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    """Int8 experts, and the same in float32."""
    part = Int8Neurons(pack(routed, width, hidden, gated, bias, act, torch.float32)).to(dtype)
    return part.packed(), widened(part.packed())


def widened(parts: PackedExperts) -> PackedExperts:
    bias = None if parts.up_bias is None else parts.up_bias.float()
    up, down = (w * s.unsqueeze(-1) for w, s in ((parts.up, parts.up_scale), (parts.down, parts.down_scale)))
    return replace(parts, up=up, down=down, up_bias=bias, up_scale=None, down_scale=None)


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want).norm() / want.norm().clamp_min(1e-6))


@OPERATOR
@pytest.mark.parametrize("at", LEVELS)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10**6))
@torch.no_grad()
def test_the_operator_is_the_reference(at: int, data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    draw = data.draw
    tokens = draw(st.one_of(st.integers(1, 8), st.integers(9, 150)))
    hidden, width, routed = draw(st.integers(1, 150)), draw(st.integers(1, 70)), draw(st.integers(1, 9))
    if draw(st.booleans()):  # pairs of bfloat16 are multiplied as such
        hidden, width = hidden + hidden % 2, width + width % 2
    active, gated, bias = draw(st.integers(1, routed)), draw(st.booleans()), draw(st.booleans())
    act, dtype = draw(st.sampled_from(list(native.ACTIVATIONS))), draw(st.sampled_from(DTYPES))
    x = torch.randn(hidden, tokens).to(dtype).T  # not contiguous
    experts, plain = int8_pack(routed, width, hidden, gated, bias, act, dtype)
    shared, plain_shared = int8_pack(1, 2 * width, hidden, gated, bias, act, dtype)
    chosen = torch.rand(tokens, routed).topk(active, 1).indices
    scale = torch.rand(tokens, active) if draw(st.booleans()) else None
    with level(at):
        got = native.decode(x, chosen, scale, experts, shared)
    routed_part = reference(x.float(), chosen, scale, plain)
    shared_part = reference(x.float(), torch.zeros(tokens, 1, dtype=torch.int64), None, plain_shared)
    size = routed_part.norm() + shared_part.norm()  # of one number, the two may cancel
    error = (got.float() - routed_part - shared_part).norm() / size.clamp_min(1e-6)
    assert got.dtype == dtype and error < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_pytorch_is_the_reference(tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler; expert 4 has no token. With gradients enabled too, where none is asked of the input."""
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "most_tokens", lambda: 0)
    x, chosen = torch.randn(tokens, 12).to(dtype), torch.rand(tokens, 4).topk(2, 1).indices
    for gated in (True, False):
        experts, plain = int8_pack(5, 6, 12, gated, True, "silu", dtype)
        want = reference(x.float(), chosen, None, plain)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                got = run_experts(x, chosen, None, experts)
                judged = reference(x, chosen, None, experts)
            assert got.dtype == dtype and not got.requires_grad
            assert distance(got, want) < (1e-5 if dtype == torch.float32 else 1e-2) > distance(judged, want)


def test_rounding_is_within_half_a_scale() -> None:
    weight = torch.randn(3, 50, 40) * torch.logspace(-6, 6, 50)[:, None]
    weight[1, 7] = 0
    numbers, scale = rounded(weight)
    assert numbers.dtype == torch.int8 and scale.shape == (3, 50)
    assert ((numbers * scale[..., None] - weight).abs() <= 0.5001 * scale[..., None]).all()
    assert not numbers[1, 7].any() and numbers.abs().amax(-1).unique().tolist() == [0, 127]
    assert rounded(torch.tensor([[1.0, torch.nan]]))[1].isnan().all()  # nothing wrong becomes a number


def quantised(seed: int = 0) -> SparseFFN:
    ffn = lone_ffn(biased=True, seed=seed)
    ffn.shared, ffn.experts = (Int8Neurons(part.packed()) for part in (ffn.shared, ffn.experts))
    return ffn.requires_grad_(False)


@pytest.mark.parametrize("grad", [False, True])
def test_a_gradient_is_refused(grad: bool) -> None:
    ffn, x = quantised(), torch.randn(3, 12, requires_grad=grad)
    if not grad:
        assert not ffn(x).requires_grad
        return
    with pytest.raises(FactorMixError, match="for inference: load the model without quantising"):
        ffn(x)
    with torch.no_grad():
        ffn(x)


def test_scales_stay_float32() -> None:
    ffn = quantised()
    before = ffn.experts.up_scale.clone()
    for cast in (ffn.to(torch.bfloat16), copy.deepcopy(ffn).half(), ffn.double()):
        assert torch.equal(cast.experts.up_scale, before) and cast.experts.up_scale.dtype == torch.float32
        assert cast.experts.up.dtype == torch.int8 and cast.bias.dtype == cast.router.weight.dtype != torch.int8


CHANGED = {
    "another scale": lambda ffn: setattr(ffn.experts, "down_scale", 2 * ffn.experts.down_scale),
    "a scale written in place": lambda ffn: ffn.shared.up_scale.mul_(2),
    "other numbers": lambda ffn: setattr(ffn.shared.up, "data", -ffn.shared.up),
    "a part in floating point": lambda ffn: setattr(ffn, "experts", lone_ffn(biased=True, seed=1).experts),
    "nothing": lambda ffn: ffn.to(torch.float64).to(torch.float32),
}


@OPERATOR
@torch.no_grad()
@pytest.mark.parametrize("what", CHANGED)
def test_one_call_and_what_changes_between_two_is_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ffn, x, calls, real = quantised(), torch.randn(3, 12), [], native.forward
    monkeypatch.setattr(native, "forward", lambda *a: (calls.append(a), real(*a))[1])
    before = ffn(x)
    CHANGED[what](ffn)
    got = ffn(x)
    assert len(calls) == (1 if what == "a part in floating point" else 2)  # a mix of kinds runs in two calls
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "most_tokens", lambda: 0)
    assert torch.allclose(got, ffn(x), rtol=1e-5, atol=1e-5) and torch.equal(got, before) == (what == "nothing")


@OPERATOR
@torch.no_grad()
def test_one_ffn_serves_both_dtypes() -> None:
    ffn, x = quantised(), torch.randn(20, 12)
    want = ffn(x)
    ffn.bfloat16()
    assert distance(ffn(x.bfloat16()), want) < 3e-2
    assert ffn.float()(x).dtype == torch.float32


def test_the_custom_operator_is_sound() -> None:
    experts, _ = int8_pack(4, 5, 6, True, True, "silu", torch.float32)
    given = (torch.randn(9, 6), torch.rand(9, 4).topk(2, 1).indices, None, experts.up, experts.down, experts.up_bias)
    torch.library.opcheck(torch.ops.factormix.run_experts, (*given, "silu", True, experts.up_scale, experts.down_scale))


@torch.no_grad()
def test_it_compiles_without_graph_breaks() -> None:
    ffn, x = quantised(), torch.randn(5, 12)
    assert torch.allclose(torch.compile(ffn, backend="eager", fullgraph=True)(x), ffn(x), rtol=1e-5, atol=1e-5)
