"""The door to the GPU's kernels, without them: when it serves, who asks it, and that nothing waits for a value."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import StaticCache

from factormix.experts import PackedExperts, gpu, native, run_experts
from factormix.experts.reference import reference
from factormix.nn.router import make_router
from tests.experts.test_paths import packed, tokens
from tests.nn.sparse import lone_ffn, twins


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The CPU taken for a GPU with kernels that the reference stands in for; the calls of them."""
    seen: list[str] = []

    def decode(x: Tensor, chosen: Tensor, scale: Tensor | None, *rest) -> Tensor:  # type: ignore[no-untyped-def]
        seen.append("decode")
        *weights, activation, gated = rest
        experts, shared = (PackedExperts(*weights[i : i + 3], activation, gated) for i in (0, 3))
        out = torch.zeros_like(x)
        if experts.up is not None:
            out = out + reference(x, chosen, scale, experts)
        if shared.up is not None:
            out = out + reference(x, torch.zeros(len(x), 1, dtype=torch.int64), None, shared)
        return out

    def route(x: Tensor, weight: Tensor, active: int) -> tuple[Tensor, Tensor]:
        seen.append("route")
        scores = x.float() @ weight.float().T
        return scores, scores.topk(active, 1).indices

    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "INSTALLED", True)
    monkeypatch.setattr(gpu, "_decode", decode)
    monkeypatch.setattr(gpu, "_route", route)
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "most_tokens", lambda: 0)
    return seen


@pytest.mark.parametrize("count", [1, 16, 17])
@pytest.mark.parametrize("layout", ["S1A2E5", "S0A2E4", "S4A0E4"])
@pytest.mark.parametrize("gate", ["hard", "paper"])
def test_a_sparse_ffn_asks_it(calls: list[str], layout: str, gate: str, count: int) -> None:
    ffn, x = lone_ffn(layout=layout, biased=True, output_weight=gate), torch.randn(count, 12)
    want = ffn(x).detach()
    assert not calls  # gradients are wanted
    with torch.no_grad():
        assert torch.allclose(ffn(x), want, rtol=1e-5, atol=1e-5)
    assert calls == ["route"] * (layout != "S4A0E4") + ["decode"] * (count <= gpu.TOKENS)


def test_a_part_with_a_hook_is_not_bypassed(calls: list[str]) -> None:
    ffn, seen = lone_ffn(), []
    ffn.shared.register_forward_hook(lambda *_: seen.append(True))
    with torch.no_grad():
        ffn(torch.randn(5, 12))
    assert seen and calls == ["route", "decode"]  # the experts alone


@pytest.mark.parametrize("kind", ["mlp", "neuron"])
def test_other_routers_score_as_they_do(calls: list[str], kind: str) -> None:
    router = make_router(kind, 12, 4, 2, "silu", True)  # type: ignore[arg-type]
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    with torch.no_grad():
        router(torch.randn(3, 12))
    assert not calls


def test_dispatch_asks_it(calls: list[str]) -> None:
    experts = packed(4, 5, 6, gated=True, biased=True)
    with torch.no_grad():
        for count in (1, 4, 16, 17):
            run_experts(*tokens(count, 6, 4, 2, True), experts)
    # a CPU's own paths come first at a handful of tokens
    assert calls == ["decode"]


def test_parts_of_two_forms_are_not_for_it(calls: list[str]) -> None:
    x, forms = (
        torch.randn(2, 6),
        [packed(3, 4, 6, True, False), packed(1, 4, 6, True, True), packed(1, 4, 6, False, False)],
    )
    with torch.no_grad():
        assert gpu.serves(x, forms[:1] * 2) and not gpu.serves(x, forms[:2]) and not gpu.serves(x, forms[::2])


STEPS_ASIDE = ["gradients", "autocast", "dtype", "activation", "tokens", "transposed", "device", "no Triton"]


@pytest.mark.parametrize("why", ["", *STEPS_ASIDE])
def test_it_steps_aside(calls: list[str], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = packed(3, 4, 6, True, False)
    if why == "activation":
        experts = replace(experts, activation="mish")
    if why == "transposed":
        experts = replace(experts, down=experts.down.transpose(1, 2).contiguous().transpose(1, 2))
    if why == "device":
        monkeypatch.setattr(gpu, "DEVICE", "cuda")
    if why == "no Triton":
        monkeypatch.setattr(gpu, "INSTALLED", False)
    x = torch.randn(gpu.TOKENS + (why == "tokens"), 6, dtype=torch.bfloat16 if why == "dtype" else torch.float32)
    with torch.set_grad_enabled(why == "gradients"), torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        assert gpu.serves(x, [experts]) is (why == "")


@pytest.mark.parametrize("count", [1, 5])
def test_the_host_asks_the_device_nothing(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have shapes and no values: whatever needed a value would fail. So a CUDA graph can hold it."""
    launched: list[str] = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]):  # type: ignore[no-untyped-def]
            return lambda *_, **__: launched.append(self.name)

    monkeypatch.setattr(gpu, "_kernels", lambda: SimpleNamespace(**{n: Kernel(n) for n in ("route", "up", "down")}))
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, experts = torch.randn(count, 6), packed(5, 4, 6, True, True)
        _, chosen = gpu.route(x, torch.randn(5, 6), 2)
        assert gpu.decode(x, chosen, torch.rand(count, 2), experts, packed(1, 9, 6, True, True)).shape == (count, 6)
    assert launched == ["route", "up", "down"]


@pytest.mark.parametrize("layout", ["S1A2E4", "S0A1E4"])
def test_nor_does_a_whole_decoding_step_with_a_static_cache(calls: list[str], layout: str) -> None:
    _, sparse = twins("llama", layout)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        ids, cache = torch.randint(0, 90, (1, 6)), StaticCache(sparse.config, max_cache_len=16)
        sparse(ids, past_key_values=cache)
        calls.clear()
        sparse(ids[:, :1], past_key_values=cache).logits.argmax(-1)
    assert calls == ["route", "decode"] * 2  # two layers
