"""A .gguf file holds the container's tensors under llama.cpp's names; transformers reads one to the same logits."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from factormix.export.gguf_file import choose_gguf, interleaved, rope_factors
from factormix.export.needs import read_needs
from factormix.run.errors import FactorMixError
from tests.export.tiny import difference, exported, factored, logits, typical
from tests.families import VOCAB

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2 has it, of VOCAB tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCAB - 4]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *letters, "ab"])}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b")], unk_token=None))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, chat_template="{{ messages }}")


def read(file: Path) -> tuple[dict[str, np.ndarray], gguf.GGUFReader]:
    reader = gguf.GGUFReader(file)
    tensors = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(*reversed(t.shape.tolist()))
        for t in reader.tensors
    }
    return tensors, reader


@pytest.mark.parametrize(("quantization", "error"), [("f16", 1e-3), ("q8_0", 2e-2)])
def test_granite_tensors_and_metadata(quantization: str, error: float, tmp_path: Path) -> None:
    model = factored("llama", rope_parameters=LLAMA3)
    result = exported(model, tmp_path / "out", to="gguf", quantizations=(quantization,), tokenizer=bytes_tokenizer())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*result.gguf, "README.md", "run.json"}
    tensors, reader = read(tmp_path / "out" / result.gguf[0])
    ffn = model.sparse_ffns()[0]
    expected = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output.weight": model.lm_head.weight,
        "blk.0.attn_q.weight": interleaved(model.model.layers[0].self_attn.q_proj.weight, 4),
        "blk.1.attn_k.weight": interleaved(model.model.layers[1].self_attn.k_proj.weight, 2),
        "blk.0.ffn_norm.weight": model.model.layers[0].post_attention_layernorm.weight,
    }
    for name, weight in expected.items():
        assert difference(torch.tensor(tensors[name]), weight.detach()) < error, name
    gate, up = ffn.experts.gate_up_proj.detach().chunk(2, dim=1)  # (R, W, H) each
    for name, weight in (("gate", gate), ("up", up), ("down", 2 * ffn.experts.down_proj.detach().transpose(1, 2))):
        stored = torch.tensor(tensors[f"blk.0.ffn_{name}_exps.weight"])
        stored = stored.transpose(1, 2) if name == "down" else stored  # (R, W', H)
        assert stored.shape[1] == 32 and not stored[:, 16:].any()  # 16 neurons and 16 of zeros
        assert difference(stored[:, :16], weight) < error
    kinds = {t.name: t.tensor_type.name.lower() for t in reader.tensors}
    assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["blk.0.attn_norm.weight"] == "f32"
    assert kinds["blk.0.ffn_down_exps.weight"] == kinds["token_embd.weight"] == quantization
    assert "rope_freqs.weight" in tensors

    def field(name: str) -> object:
        return reader.fields[name].contents()

    assert field("general.architecture") == "granitemoe" and field("granitemoe.expert_used_count") == 2
    assert field("granitemoe.expert_count") == 3 and field("granitemoe.feed_forward_length") == 32
    assert field("granitemoe.expert_shared_feed_forward_length") == 32
    assert field("granitemoe.attention.scale") == pytest.approx(8**-0.5)
    assert field("tokenizer.ggml.pre") == "gpt-2" and field("tokenizer.chat_template") == "{{ messages }}"
    assert len(field("tokenizer.ggml.tokens")) == VOCAB  # type: ignore[arg-type]


def test_m_is_chosen_by_how_llama_cpp_scores(tmp_path: Path) -> None:
    model = factored("llama")
    stock = exported(model, tmp_path / "out").router_scale
    read_by_llama_cpp = exported(model, tmp_path / "gguf", to="gguf", tokenizer=bytes_tokenizer()).router_scale
    assert stock.m == max(stock.flips) and not any(stock.flips.values())  # Granite chooses first: no ties
    assert any(read_by_llama_cpp.flips.values())


def test_plain_transformers_reads_a_file_to_the_same_logits(tmp_path: Path) -> None:
    """transformers knows llama.cpp's qwen3moe, all but its width of an expert."""
    model = factored("qwen3", "S0A2E4")
    result = exported(model, tmp_path / "out", to="gguf", tokenizer=bytes_tokenizer())
    config = result.choice.container.config(result.choice.needs)
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file=result.gguf[0], dtype=torch.float32, config=config
    )
    assert typical(logits(stock), logits(model)) < 5e-3  # f16 weights


def test_rope_factors_are_what_transformers_divides_by() -> None:
    model = factored("llama", rope_parameters=LLAMA3)
    plain = factored("llama", rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    divided = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    assert torch.allclose(rope_factors(model.config), divided, rtol=1e-4)


def test_the_first_container_is_left_where_llama_cpp_reads_only_the_next_one_right() -> None:
    needs = read_needs(factored("llama", "S0A2E4", head_dim=12))
    assert choose_gguf(needs, approximate=False).container.name == "mixtral"
    needs = read_needs(factored("llama", "S1A2E4", head_dim=12))
    assert choose_gguf(needs, approximate=False).container.name == "glm4_moe"
    assert choose_gguf(read_needs(factored("llama", "S0A2E4")), approximate=False).container.name == "granite"


def test_qwen2moe_has_a_gate_that_is_a_half_an_output_of_its_own_and_biases(tmp_path: Path) -> None:
    model = factored("qwen2", tie_word_embeddings=True)
    result = exported(model, tmp_path / "out", to="gguf", tokenizer=bytes_tokenizer())
    tensors, _ = read(tmp_path / "out" / result.gguf[0])
    gate = torch.tensor(tensors["blk.0.ffn_gate_inp_shexp.weight"])
    v = torch.randn(1000, len(gate)) @ gate
    assert v.all()  # llama.cpp divides by it
    assert torch.allclose(v.sigmoid(), torch.full_like(v, 0.5), atol=1e-7)
    own = model.sparse_ffns()[0].shared.down_proj.weight.detach()
    assert difference(torch.tensor(tensors["blk.0.ffn_down_shexp.weight"])[:, : own.shape[1]], 2 * own) < 1e-3
    assert np.array_equal(tensors["output.weight"], tensors["token_embd.weight"])
    assert np.array_equal(tensors["blk.1.attn_q.bias"], model.model.layers[1].self_attn.q_proj.bias.detach())


def test_glm4moe_weighs_by_a_sigmoid_times_k(tmp_path: Path) -> None:
    model = factored("qwen3", "S1A2E4")
    result = exported(model, tmp_path / "out", to="gguf", tokenizer=bytes_tokenizer())
    tensors, reader = read(tmp_path / "out" / result.gguf[0])
    fields = {name.removeprefix("glm4moe."): field.contents() for name, field in reader.fields.items()}
    assert fields["expert_gating_func"] == gguf.ExpertGatingFuncType.SIGMOID
    assert fields["expert_weights_norm"] and fields["expert_weights_scale"] == 2.0
    assert fields["expert_shared_count"] == 1 and fields["expert_count"] == 3
    assert not tensors["blk.0.exp_probs_b.bias"].any() and "blk.0.post_attention_norm.weight" in tensors


@pytest.mark.parametrize(
    ("family", "layout", "config", "says"),
    [
        ("llama", "S1A2E4", {"head_dim": 12, "rope_parameters": LLAMA3}, "heads of 8, not of 12"),
        ("llama", "S1A2E4", {"attention_bias": True}, "attention biases"),
        ("mistral", "S0A2E4", {"sliding_window": 8}, "sliding window"),
        ("qwen3", "S0A2E4", {"rope_parameters": LLAMA3}, "drop the rope scaling 'llama3'"),
        ("olmo2", "S0A2E4", {}, "norms"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    family: str, layout: str, config: dict[str, object], says: str
) -> None:
    model = factored(family, layout, **{"tie_word_embeddings": False, **config})
    model.config.head_dim = getattr(model.config, "head_dim", None) or 8
    with pytest.raises(FactorMixError, match=says):
        choose_gguf(read_needs(model), approximate=False)


def test_a_tokenizer_that_llama_cpp_cannot_name_is_refused(tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(FactorMixError, match=r"GPT-2, SmolLM, Llama-3, Qwen2"):
        exported(factored("llama"), tmp_path / "out", to="gguf", tokenizer=tokenizer)
    with pytest.raises(FactorMixError, match="holds its tokenizer"):
        exported(factored("llama"), tmp_path / "out", to="gguf")
    with pytest.raises(FactorMixError, match="unknown quantization 'q4'"):
        exported(factored("llama"), tmp_path / "out", to="gguf", quantizations=("q4",), tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()
