"""A .gguf file is a MODEL like any other: a tiny random one, written here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from transformers import AutoModelForCausalLM

import factormix

HIDDEN, INNER, LAYERS, HEADS = 32, 64, 2, 4
TOKENS = ["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz0123456789."]
SPECIAL, NORMAL = 3, 1  # token types of the format


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path, draw = tmp_path / "tiny.gguf", np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0] * len(TOKENS))
    writer.add_token_types([SPECIAL] * 3 + [NORMAL] * (len(TOKENS) - 3))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def tensor(name: str, *shape: int) -> None:
        writer.add_tensor(f"{name}.weight", (0.15 * draw.standard_normal(shape)).astype(np.float32))

    tensor("token_embd", len(TOKENS), HIDDEN)
    tensor("output_norm", HIDDEN)
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            tensor(f"blk.{layer}.{name}", HIDDEN)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensor(f"blk.{layer}.{name}", HIDDEN, HIDDEN)
        for name in ("ffn_gate", "ffn_up"):
            tensor(f"blk.{layer}.{name}", INNER, HIDDEN)
        tensor(f"blk.{layer}.ffn_down", HIDDEN, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf(run: Callable[..., str], file: Path, text: Path) -> None:
    assert f"{INNER}  silu" in run("inspect", file)
    run("generate", file, "w1", "--max-new-tokens", 2)
    cut = ("--layout", "S1A1E4", "--tokens", 512, "--window", 32)
    run("factor", file, "-o", "out", "--text", text, *cut)
    dense = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    same = dict(dense.named_parameters())["model.layers.1.self_attn.o_proj.weight"]
    assert same.equal(dict(factormix.load("out").named_parameters())["model.layers.1.self_attn.o_proj.weight"])
    base = json.loads(Path("out/config.json").read_text(encoding="utf-8"))["base_config"]
    assert "quantization_config" not in base  # the weights are plain numbers by now
    run("eval", "out", "--against", file, "--text", text, "--tokens", 128, "--window", 32)


def test_a_truncated_gguf_file_is_named(refused: Callable[..., str], file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4000])
    assert str(file) in refused("generate", file, "a")
