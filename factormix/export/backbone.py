"""Describe the backbone: the parts of a dense decoder, other than FFNs, that a stock container must hold.

A family is one entry of `BACKBONES`, which describes its attention and norms. A container (containers/) says which of
these it can hold. So no code outside this file knows the field names of a family's config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PretrainedConfig

from factormix.run.errors import FactorMixError

# Fields with the same name and meaning in every family and container here.
COMMON = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id bos_token_id eos_token_id "
    "tie_word_embeddings rope_parameters attention_dropout"
).split()


@dataclass(frozen=True)
class Backbone:
    """A decoder without its FFNs.

    Attributes:
        family: the dense model_type.
        common: config fields that every container takes unchanged.
        head_dim: size of an attention head.
        qkv_bias: whether the q, k and v projections have biases.
        out_bias: whether the attention's output projection has a bias.
        qk_norm: queries and keys are normed by head ("head"), over all heads ("whole") or not at all ("none").
        norm: whether the norms stand before or after attention and FFN.
        window: number of positions that a token attends to in the layers of `windowed`, or None.
        windowed: for each layer, whether its attention has a window.
        attention, embedding, residual, logits: Granite's three multipliers and its divisor of the logits. In other
            families attention is head_dim ** -0.5 and the others are 1.
    """

    family: str
    common: Mapping[str, Any]
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["none", "head", "whole"] = "none"
    norm: Literal["before", "after"] = "before"
    window: int | None = None
    windowed: tuple[bool, ...] = ()
    attention: float = 0.0
    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0

    @property
    def has_multipliers(self) -> bool:
        """True if a multiplier differs from its value in other families."""
        return self.attention != self.head_dim**-0.5 or (self.embedding, self.residual, self.logits) != (1, 1, 1)


def _llama(config: PretrainedConfig) -> dict[str, Any]:
    return {"qkv_bias": config.attention_bias, "out_bias": config.attention_bias}


def _mistral(config: PretrainedConfig) -> dict[str, Any]:
    window = config.sliding_window
    return {"window": window, "windowed": (window is not None,) * config.num_hidden_layers}


def _by_layer(config: PretrainedConfig) -> dict[str, Any]:
    windowed = tuple(kind == "sliding_attention" for kind in config.layer_types)
    return {"window": config.sliding_window if any(windowed) else None, "windowed": windowed}


def _granite(config: PretrainedConfig) -> dict[str, Any]:
    return {
        **_llama(config),
        "attention": config.attention_multiplier,
        "embedding": config.embedding_multiplier,
        "residual": config.residual_multiplier,
        "logits": config.logits_scaling,
    }


BACKBONES: dict[str, Callable[[PretrainedConfig], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": lambda config: {"qkv_bias": True, **_by_layer(config)},
    "qwen3": lambda config: {**_llama(config), "qk_norm": "head", **_by_layer(config)},
    "olmo2": lambda config: {**_llama(config), "qk_norm": "whole", "norm": "after"},
    "granite": _granite,
}


def read_backbone(config: PretrainedConfig) -> Backbone:
    """The backbone of a dense model's config, or of a factored model's.

    Raises:
        FactorMixError: no stock container holds this family.
    """
    family = config.model_type
    if family not in BACKBONES:
        raise FactorMixError(
            f"no stock container holds the attention and norms of a {family!r} model; allowed: "
            f"{', '.join(sorted(BACKBONES))}. Serve it with FactorMix's own loader (factormix.load)."
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    own = {"attention": head_dim**-0.5, **BACKBONES[family](config)}
    common = {name: getattr(config, name) for name in COMMON}
    return Backbone(family, common, head_dim, **own)
