"""Stock MoE models of transformers on FactorMix's paths: the same outputs and gradients as their own eager loop."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedModel

from factormix.experts import dispatch, native, register
from factormix.run.errors import FactorMixError

BASE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
}
QWEN = {**BASE, "num_experts": 5, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
STOCK = {
    "mixtral": (hf.MixtralConfig, hf.MixtralForCausalLM, {**BASE, "num_local_experts": 5}),
    "qwen2_moe": (hf.Qwen2MoeConfig, hf.Qwen2MoeForCausalLM, {**QWEN, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": (hf.Qwen3MoeConfig, hf.Qwen3MoeForCausalLM, {**QWEN, "norm_topk_prob": True}),
    "granitemoe": (hf.GraniteMoeConfig, hf.GraniteMoeForCausalLM, {**BASE, "num_local_experts": 5}),
    "olmoe": (hf.OlmoeConfig, hf.OlmoeForCausalLM, {**BASE, "num_experts": 5}),
}
every_model = pytest.mark.parametrize("name", STOCK)


def stock(name: str, **options: object) -> PreTrainedModel:
    """A tiny random stock model that runs its own loop."""
    config, model, settings = STOCK[name]
    torch.manual_seed(0)
    made = model(config(**{**settings, **options}, experts_implementation="eager")).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.2)
    return made


def prompt(rows: int = 2, length: int = 6) -> Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(4))


def switched(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that runs FactorMix's paths: the one line of the README."""
    twin = copy.deepcopy(model)
    twin.set_experts_implementation("factormix")
    return twin


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(path, tokens) of each call."""
    calls: list[tuple[str, int]] = []
    for owner, name in ((native, "decode"), (dispatch, "grouped"), (dispatch, "tokenwise")):
        own = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda x, *a, _own=own, _name=name: (calls.append((_name, len(x))), _own(x, *a))[1]
        )
    return calls


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 9)])
@torch.no_grad()
def test_it_equals_the_models_own_loop(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    model, ids = stock(name).to(dtype), prompt(*shape)
    assert relative(switched(model)(ids).logits, model(ids).logits) < (1e-5 if dtype == torch.float32 else 3e-2)


@every_model
def test_gradients_are_the_same(name: str) -> None:
    model, ids, found = stock(name).train(), prompt(), []
    for one in (model, switched(model)):
        one(ids, labels=ids).loss.backward()
        found.append({key: p.grad for key, p in one.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and any("experts" in key for key in found[0])
    for key, want in found[0].items():
        assert torch.allclose(found[1][key], want, rtol=1e-4, atol=1e-6), key


@every_model
def test_generate_gives_the_same_tokens_and_decodes_on_the_fast_path(name: str, seen: list[tuple[str, int]]) -> None:
    model, ids = stock(name), prompt(1)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    want = model.generate(ids, **options)
    assert not seen
    assert torch.equal(switched(model).generate(ids, **options), want)
    some, one = ("grouped", "tokenwise") if native.library() is None else ("decode", "decode")
    assert seen == [(some, 6)] * 2 + [(one, 1)] * 8  # two layers; the prompt, then four tokens


def test_it_is_chosen_when_a_model_is_loaded(tmp_path, seen: list[tuple[str, int]]) -> None:  # type: ignore[no-untyped-def]
    stock("mixtral").save_pretrained(tmp_path)
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="factormix")
    with torch.no_grad():
        model(prompt(1, 1))
    assert len(seen) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_under_autocast(dtype: torch.dtype) -> None:
    model, ids = stock("mixtral"), prompt()
    want = model(ids).logits
    with torch.autocast("cpu", dtype=dtype):
        assert relative(switched(model)(ids).logits, want) < 5e-2


@torch.no_grad()
def test_it_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    model, ids = switched(stock("qwen3_moe", num_hidden_layers=1)), prompt(2, 9)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_plain_experts_without_a_gate() -> None:
    torch.manual_seed(0)
    experts = nn.Module()
    experts.up_proj, experts.down_proj = nn.Parameter(torch.randn(3, 8, 6)), nn.Parameter(torch.randn(3, 6, 8))
    experts.act_fn = hf.activations.ACT2FN["relu2"]
    vars(experts).update(has_gate=False, has_bias=False, is_transposed=False, is_concatenated=True)
    x, chosen, weights = torch.randn(9, 6), torch.rand(9, 3).topk(2, 1).indices, torch.rand(9, 2)
    got = register.experts_forward(experts, x, chosen, weights)
    want = torch.zeros_like(x)
    for t in range(9):
        for k in range(2):
            i = int(chosen[t, k])
            want[t] += weights[t, k] * experts.down_proj[i] @ (experts.up_proj[i] @ x[t]).relu().square()
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)


def _quantised(module: nn.Module) -> None:
    class Other(nn.Parameter):
        pass

    module.down_proj.__class__ = Other


def _own_gate(module: nn.Module) -> None:
    module.__class__ = type("OwnGate", (type(module),), {"_apply_gate": lambda self, x: x})


OTHERS = {
    "transposed weights": lambda m: setattr(m, "is_transposed", True),
    "interleaved": lambda m: setattr(m, "is_concatenated", False),
    "biases": lambda m: setattr(m, "has_bias", True),
    "a norm behind": lambda m: setattr(m, "has_post_expert_norm", True),
    "spread over devices": lambda m: setattr(m, "_is_expert_parallel", True),
    "a gate of its own": _own_gate,
    "weights of type": _quantised,
    "activation PReLU": lambda m: setattr(m, "act_fn", nn.PReLU()),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_forms_are_refused_with_the_remedy(what: str) -> None:
    model = switched(stock("mixtral"))
    OTHERS[what](model.model.layers[0].mlp.experts)
    with pytest.raises(FactorMixError, match=f"Experts|OwnGate.*{what}.*set_experts_implementation"), torch.no_grad():
        model(prompt(1, 1))


def test_gpt_oss_is_refused() -> None:
    config = hf.GptOssConfig(**{**BASE, "num_local_experts": 4, "head_dim": 8})
    model = hf.GptOssForCausalLM(config)
    model.set_experts_implementation("factormix")
    with pytest.raises(FactorMixError, match="GptOssExperts has transposed weights.*set_experts_implementation"):
        model(prompt(1, 1))
