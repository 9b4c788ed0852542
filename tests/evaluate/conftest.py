"""Tiny random models and windows for this room's tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from factormix.data.packing import Packed
from factormix.nn.sparse_ffn import SparseFFN
from tests.evaluate.tiny import HEADS, HIDDEN, INNER, LAYERS, SPEC, VOCAB


@pytest.fixture
def llama() -> Callable[..., LlamaForCausalLM]:
    """Builds a random llama; two seeds give two models. Weights are large enough that they disagree."""

    def build(seed: int = 0, **changes: object) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        config = LlamaConfig(
            **{
                "vocab_size": VOCAB,
                "hidden_size": HIDDEN,
                "intermediate_size": INNER,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": HEADS,
                "num_key_value_heads": HEADS,
                "max_position_embeddings": 128,
                "initializer_range": 0.2,
                "tie_word_embeddings": False,
                **changes,
            }
        )
        return LlamaForCausalLM(config).eval()

    return build


@pytest.fixture
def windows() -> Callable[..., Packed]:
    """N windows of L random tokens, a BOS first that is not scored, nor are the `unscored` last tokens of the last."""

    def build(count: int = 6, length: int = 12, seed: int = 0, unscored: int = 0) -> Packed:
        ids = torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))
        ids[:, 0] = 1
        scored = torch.ones_like(ids, dtype=torch.bool)
        scored[:, 0] = False
        if unscored:
            scored[-1, -unscored:] = False
        return Packed(input_ids=ids, scored=scored, tokens=ids.numel(), sha256="0" * 64)

    return build


@pytest.fixture
def sparse_llama(llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    """A llama with FFNs S4A1E8: half their neurons and one of four experts run for a token."""
    model = llama()
    for layer in model.model.layers:
        layer.mlp = SparseFFN(SPEC)
        for parameter in layer.mlp.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()
