"""What must survive the trip, one test each, over the families that have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from tests.cli.tiny import save_tiny
from tests.export.tiny import difference, exported, factored, logits, typical, windows

FAMILIES = {"llama": "S1A2E4", "mistral": "S0A2E4", "qwen2": "S1A2E4", "qwen3": "S1A2E4", "olmo2": "S0A2E4"}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip

WINDOWED = {"use_sliding_window": True, "sliding_window": 8, "layer_types": None}


def trip(model: PreTrainedModel, folder: Path, **options: Any) -> PreTrainedModel:
    """The model exported, loaded by plain transformers, and with the same logits."""
    exported(model, folder, **options)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert typical(logits(stock), logits(model)) < 1e-3
    return stock


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_head(family: str, tmp_path: Path) -> None:
    stock = trip(factored(family, FAMILIES[family], tie_word_embeddings=True), tmp_path / "out")
    assert stock.lm_head.weight is stock.model.embed_tokens.weight
    stock = trip(factored(family, FAMILIES[family], tie_word_embeddings=False), tmp_path / "two")
    assert not torch.equal(stock.lm_head.weight, stock.model.embed_tokens.weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_rope_scaling(family: str, tmp_path: Path) -> None:
    model = factored(family, FAMILIES[family], rope_parameters=LLAMA3)
    stock = trip(model, tmp_path / "out")
    assert stock.config.rope_parameters.items() >= LLAMA3.items()
    plain = factored(family, FAMILIES[family], rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    assert difference(logits(plain), logits(model)) > 1e-2  # it matters


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3-plain", "olmo2"])
def test_attention_bias(family: str, tmp_path: Path) -> None:
    name, layout = family.removesuffix("-plain"), "S0A2E4" if family in ("olmo2", "qwen3-plain") else "S1A2E4"
    options = {} if name == "qwen2" else {"attention_bias": True}
    stock = trip(factored(name, layout, **options), tmp_path / "out")
    assert stock.model.layers[0].self_attn.q_proj.bias.abs().sum() > 0


@pytest.mark.parametrize(("family", "layout"), [("qwen3", "S1A2E4"), ("qwen3", "S0A2E4"), ("olmo2", "S0A2E4")])
def test_query_and_key_norms(family: str, layout: str, tmp_path: Path) -> None:
    model = factored(family, layout)
    stock = trip(model, tmp_path / "out")
    norm = stock.model.layers[0].self_attn.q_norm.weight
    assert torch.equal(norm, model.model.layers[0].self_attn.q_norm.weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_size_of_its_own(family: str, tmp_path: Path) -> None:
    if family in ("qwen2", "olmo2"):
        model = factored(family, FAMILIES[family], num_attention_heads=2)  # theirs is hidden over heads
    else:
        model = factored(family, FAMILIES[family], head_dim=12)
    stock = trip(model, tmp_path / "out")
    assert stock.model.layers[0].self_attn.head_dim == model.model.layers[0].self_attn.head_dim != 8


@pytest.mark.parametrize(
    ("family", "layout", "options"),
    [
        ("mistral", "S0A2E4", {"sliding_window": 8}),
        ("qwen2", "S1A2E4", {**WINDOWED, "max_window_layers": 1}),
        ("qwen3", "S0A2E4", {**WINDOWED, "max_window_layers": 0}),
    ],
)
def test_a_sliding_window(family: str, layout: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = factored(family, layout, **options)
    trip(model, tmp_path / "out")
    everywhere = factored(family, layout, **{"sliding_window": None} if family == "mistral" else {})
    assert difference(logits(everywhere), logits(model)) > 1e-2  # it matters in windows of 64


def test_a_sliding_window_with_shared_neurons_limits_the_context(tmp_path: Path) -> None:
    model = factored("mistral", "S1A2E4", sliding_window=16)
    result = exported(model, tmp_path / "out", to="granite", approximate=True)
    assert "context ends at 16 positions" in result.choice.approximations[0]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stock.config.max_position_embeddings == 16
    ids = windows(8).input_ids[:, :16]
    with torch.no_grad():
        assert typical(stock(input_ids=ids).logits, model(input_ids=ids).logits) < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_chat_template_and_generation_config(family: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_tiny(family, tmp_path / "dense"))
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}w0"
    model = factored(family, FAMILIES[family])
    model.generation_config = GenerationConfig(temperature=0.7, do_sample=True, eos_token_id=[2, 5], top_k=7)
    exported(model, tmp_path / "out", tokenizer=tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "w1 w22 unheard w3"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"] and again.pad_token == "<pad>"
    chat = [{"role": "w4", "content": "w5 w6"}]
    assert again.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)
    said = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert (said.temperature, said.do_sample, said.eos_token_id, said.top_k) == (0.7, True, [2, 5], 7)
