"""Make models of a known shape with random weights, because speed does not depend on what a model knows.

dense, sparse = random_models("tinyllama", Layout.parse("S4A4E16"))
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from factormix.ffn import copy_structure, find_sites, swap
from factormix.nn import Layout, SparseFFN, SparseSpec, adopt
from factormix.run.errors import choose

SHAPES: dict[str, dict[str, Any]] = {
    "tinyllama": {
        "vocab_size": 32_000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "smollm2-135m": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}
"""The shapes of TinyLlama-1.1B and SmolLM2-135M, from their config.json."""
STD = 0.02  # standard deviation of every weight


def random_models(
    shape: str, layout: Layout, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A dense llama of a known shape, and a sparse one that shares all its tensors outside the FFNs.

    The routers' weights are random too, so the tokens of a batch choose different experts.

    Args:
        shape: a key of `SHAPES`.
        layout: the layout of every FFN of the sparse model.
        dtype: dtype of all weights.
        seed: seed of the weights.

    Returns:
        (dense, sparse), both in eval mode on the CPU.

    Raises:
        FactorMixError: the shape is unknown, or the layout does not divide its inner width.
    """
    choose("shape", shape, SHAPES)
    return random_llamas(LlamaConfig(**SHAPES[shape]), layout, dtype, seed)


@torch.no_grad()
def random_llamas(
    config: LlamaConfig, layout: Layout, dtype: torch.dtype, seed: int
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Like `random_models`, for any config."""
    width = layout.width(config.intermediate_size)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        dense = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
        sparse = copy_structure(dense)
        sites = find_sites(dense)
        spec = SparseSpec(
            hidden=config.hidden_size,
            width=width,
            shared=layout.shared,
            active=layout.active,
            slices=layout.slices,
            activation=config.hidden_act,
            gated=True,
        )
        for site in sites:
            with torch.device("meta"):
                ffn = SparseFFN(spec).to(dtype)
            ffn = ffn.to_empty(device=dense.device).eval()
            for parameter in ffn.parameters():
                parameter.normal_(std=STD)
            swap(sparse, site, ffn)
    adopt(sparse, dict.fromkeys(sites, spec), {"config": {"layout": str(layout)}, "weights": "random"})
    return dense, sparse.eval()
