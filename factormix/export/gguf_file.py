"""Write a container in llama.cpp's GGUF format, for the containers in `ARCHITECTURES`.

Matrices become f16 or q8_0, while norms, biases and routers stay F32. In the architectures marked `permuted`, llama.cpp
rotates pairs of neighbouring dimensions where transformers rotates halves. So their query and key rows are interleaved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from factormix.export.choose import Choice, choose_container
from factormix.export.container import Block, Container
from factormix.export.containers import CONTAINERS
from factormix.export.gguf_tokenizer import add_tokenizer
from factormix.export.needs import Needs
from factormix.export.scoring import Scoring
from factormix.run.errors import FactorMixError

FORMATS = {
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
BLOCK = 32  # q8_0 has one scale for so many numbers of a row
NAMES = {  # names below a layer: those of transformers, and those of llama.cpp
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@dataclass(frozen=True)
class Architecture:
    """A container in llama.cpp.

    Attributes:
        name: its name in llama.cpp.
        permuted: whether query and key rows are interleaved.
        describe: writes the fields that only this architecture has.
        rope_scaling: whether it reads Llama-3's frequency factors.
        head_size: whether it can read a head size other than hidden size / heads.
        biases: whether query, key and value biases are written.
        untied: whether it needs an output matrix, even if that is a copy of the embeddings.
        norm: its name of the norm before the experts.
        experts: the config's field with the number of experts.
        more: tensors of an FFN in addition to router, experts and shared neurons, or in another form than these.
    """

    name: str
    permuted: bool
    describe: Callable[[gguf.GGUFWriter, PretrainedConfig], None]
    rope_scaling: bool = False
    head_size: bool = False
    biases: bool = False
    untied: bool = False
    norm: str = "ffn_norm"
    experts: str = "num_local_experts"
    more: Callable[[Block], dict[str, Tensor]] = lambda block: {}


def _granite(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)
    if config.shared_intermediate_size:
        writer.add_expert_shared_feed_forward_length(config.shared_intermediate_size)


def _mixtral(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_feed_forward_length(config.intermediate_size)


def _qwen3(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _qwen2(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    _qwen3(writer, config)
    writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _glm4(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    _qwen3(writer, config)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_leading_dense_block_count(0)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_weights_scale(config.routed_scaling_factor)


def _qwen2_shared(block: Block) -> dict[str, Tensor]:
    assert block.shared_down is not None  # this container always has shared neurons, which may be zeros
    hidden = block.shared_down.shape[0]
    return {"ffn_gate_inp_shexp.weight": half_open(hidden), "ffn_down_shexp.weight": 2 * block.shared_down}


def half_open(hidden: int) -> Tensor:
    """Weights (H) float32 for which the gate of qwen2moe's shared neurons is always 1/2.

    llama.cpp computes the sigmoid as silu(v) / v, which is NaN if v is exactly 0, so the weights must not be zero. They
    take a few coordinates of the input with very small weights of very different size. Then v is too small to move the
    sigmoid from 1/2 by more than rounding, and it is 0 only if all these coordinates are 0.
    """
    gate = torch.zeros(hidden)
    sizes = torch.tensor([-30.0, -54.0, -78.0, -102.0])[:hidden]
    gate[: len(sizes)] = torch.exp2(sizes)
    return gate


def _glm4_correction(block: Block) -> dict[str, Tensor]:
    return {"exp_probs_b.bias": torch.zeros(len(block.router))}


ARCHITECTURES = {
    "granite": Architecture("granitemoe", True, _granite, rope_scaling=True),
    "mixtral": Architecture("llama", True, _mixtral, rope_scaling=True, head_size=True),
    "qwen2_moe": Architecture(
        "qwen2moe", False, _qwen2, biases=True, untied=True, experts="num_experts", more=_qwen2_shared
    ),
    "qwen3_moe": Architecture("qwen3moe", False, _qwen3, head_size=True),
    "glm4_moe": Architecture(
        "glm4moe", False, _glm4, head_size=True, biases=True, norm="post_attention_norm", more=_glm4_correction
    ),
}


def gguf_problem(container: Container, needs: Needs) -> str | None:
    """Why llama.cpp would not compute this model's logits, as a sentence; None if it would."""
    architecture = ARCHITECTURES.get(container.name)
    backbone = needs.backbone
    if architecture is None:
        return f"{container.name} is not written as GGUF; allowed: {', '.join(ARCHITECTURES)}. Export it for vLLM."
    hidden, heads = backbone.common["hidden_size"], backbone.common["num_attention_heads"]
    if backbone.head_dim * heads != hidden and not architecture.head_size:
        return f"llama.cpp's {architecture.name} takes heads of {hidden // heads}, not of {backbone.head_dim}."
    kind = (backbone.common["rope_parameters"] or {}).get("rope_type", "default")
    if kind not in ("default", "llama3") or (kind == "llama3" and not architecture.rope_scaling):
        return f"llama.cpp's {architecture.name} would drop the rope scaling {kind!r}."
    if backbone.window is not None and not needs.cut_context:
        return f"llama.cpp's {architecture.name} has no sliding window."
    if backbone.qkv_bias and not architecture.biases:
        return f"llama.cpp's {architecture.name} is not written with attention biases."
    return None


def write_gguf(
    file: Path,
    container: Container,
    config: PretrainedConfig,
    state: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    quantization: str,
    name: str,
) -> None:
    """Write a container as a .gguf file.

    Args:
        file: the file to write.
        container: one of `ARCHITECTURES`.
        config: config of the exported model.
        state: tensors of the exported model by transformers' names.
        tokenizer: the tokenizer, which is part of the file.
        quantization: "f16" or "q8_0".
        name: name of the model.

    Raises:
        FactorMixError: llama.cpp does not have this kind of tokenizer.
    """
    architecture, (kind, file_type) = ARCHITECTURES[container.name], FORMATS[quantization]
    writer = gguf.GGUFWriter(str(file), architecture.name)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _describe(writer, config)
    writer.add_expert_count(getattr(config, architecture.experts))
    architecture.describe(writer, config)
    add_tokenizer(writer, tokenizer, config.vocab_size)
    for label, tensor in _tensors(container, config, state, architecture):
        dtype = kind if tensor.dim() > 1 and "ffn_gate_inp" not in label else gguf.GGMLQuantizationType.F32
        data = tensor.detach().float().cpu().contiguous().numpy()
        if dtype == gguf.GGMLQuantizationType.Q8_0 and data.shape[-1] % BLOCK:
            dtype = gguf.GGMLQuantizationType.F16  # the row is not a whole number of blocks
        writer.add_tensor(label, gguf.quants.quantize(data, dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_expert_used_count(config.num_experts_per_tok)


def _tensors(
    container: Container, config: PretrainedConfig, state: Mapping[str, Tensor], architecture: Architecture
) -> list[tuple[str, Tensor]]:
    """All tensors with their names in llama.cpp."""
    found = [(f"{TOP[n.rpartition('.')[0]]}.weight", t) for n, t in state.items() if n.rpartition(".")[0] in TOP]
    if architecture.untied and config.tie_word_embeddings:
        found.append(("output.weight", state["model.embed_tokens.weight"]))
    names = {**NAMES, "post_attention_layernorm": architecture.norm}
    if config.rope_parameters.get("rope_type") == "llama3":
        found.append(("rope_freqs.weight", rope_factors(config)))
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        for name, tensor in own.items():
            part, _, kind = name.rpartition(".")
            if part in names:
                turned = interleaved(tensor, heads[part]) if architecture.permuted and part in heads else tensor
                found.append((f"blk.{layer}.{names[part]}.{kind}", turned))
        block = container.block(own)
        found += [(f"blk.{layer}.{name}", t) for name, t in {**_ffn(block), **architecture.more(block)}.items()]
    return found


def _ffn(block: Block) -> dict[str, Tensor]:
    gate, up = block.gate_up.chunk(2, dim=1)  # (R, W, H) each
    named = {
        "ffn_gate_inp.weight": block.router,
        "ffn_gate_exps.weight": gate,
        "ffn_up_exps.weight": up,
        "ffn_down_exps.weight": block.down,
    }
    if block.shared_gate_up is not None and block.shared_down is not None:
        low, high = block.shared_gate_up.chunk(2)  # (S, H) each
        shared = (("gate", low), ("up", high), ("down", block.shared_down))
        named |= {f"ffn_{name}_shexp.weight": tensor for name, tensor in shared}
    return named


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head from halves to pairs: 0, D/2, 1, D/2 + 1, ...; (heads * D, ...), same shape out."""
    by_half = weight.view(heads, 2, -1, *weight.shape[1:])  # (heads, 2, D / 2, ...)
    return by_half.transpose(1, 2).reshape(weight.shape)


def rope_factors(config: PretrainedConfig) -> Tensor:
    """Llama-3's rope scaling in llama.cpp's form: the divisor of each frequency, (D / 2) float32."""
    rope: dict[str, Any] = config.rope_parameters
    frequencies = 1.0 / rope["rope_theta"] ** (np.arange(0, config.head_dim, 2) / config.head_dim)
    waves = 2 * math.pi / frequencies
    context, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((context / waves - low) / (high - low), 0.0, 1.0)  # 1 for short waves, which are not scaled
    return torch.tensor(1.0 / ((1 - smooth) / rope["factor"] + smooth), dtype=torch.float32)


def llama_cpp_scoring(scoring: Scoring) -> Scoring:
    """A container's scoring in llama.cpp, which scores all experts before it chooses."""
    return replace(scoring, kind="softmax") if scoring.kind == "topk" else scoring


def choose_gguf(needs: Needs, approximate: bool) -> Choice:
    """Choose the container of a GGUF file, with widths padded to whole blocks.

    Raises:
        FactorMixError: no container holds the model, or llama.cpp would compute other logits.
    """
    candidates = [
        name
        for name in ARCHITECTURES
        if gguf_problem(CONTAINERS[name], needs) is None and (approximate or not CONTAINERS[name].problems(needs))
    ]
    choice = choose_container(needs, "auto", approximate, candidates or ARCHITECTURES)
    if problem := gguf_problem(choice.container, choice.needs):
        raise FactorMixError(f"no GGUF: {problem}")
    return replace(choice, needs=padded(choice.needs))


def padded(needs: Needs) -> Needs:
    """The needs with expert and shared widths rounded up to whole blocks, which zero neurons will fill."""
    width, shared = (-(-n // BLOCK) * BLOCK for n in (needs.width, needs.shared))
    return replace(needs, width=width, shared=shared)
