"""One tiny random model for each family, for every room's tests: a new family joins them all by one line here.

The numbers (hidden 32, inner 64, 2 layers, vocabulary 99) are the same for all. Biases and norms are random too: a
forgotten bias shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

HIDDEN, INNER, LAYERS, VOCAB = 32, 64, 2, 99

_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = {**_BASE, "num_key_value_heads": 2}
_GEMMA = {**_GQA, "head_dim": 8}
_GEMMA2 = {**_GEMMA, "query_pre_attn_scalar": 8, "sliding_window": 8}
_IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GPT2 = {**_IDS, "n_embd": HIDDEN, "n_inner": INNER, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
_DISTIL = {"vocab_size": VOCAB, "dim": HIDDEN, "hidden_dim": INNER, "n_layers": LAYERS, "n_heads": 4, "pad_token_id": 0}
_OPT = {**_BASE, "ffn_dim": INNER, "word_embed_proj_dim": HIDDEN}
_DEBERTA = {**_BASE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
_T5 = {"vocab_size": VOCAB, "d_model": HIDDEN, "d_ff": INNER, "num_layers": LAYERS, "num_heads": 4, "d_kv": 8}
_T5_IDS = {**_T5, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
_SIGLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
_GEMMA3 = {
    "text_config": _GEMMA2,
    "vision_config": {**_SIGLIP, "image_size": 16, "patch_size": 8},
    "mm_tokens_per_image": 4,
    "image_token_index": 98,
    "boi_token_index": 97,
    "eoi_token_index": 96,
}


@dataclass(frozen=True)
class Tiny:
    """How to build one tiny model, and what `find_sites` must say of it (defaults: a gated decoder)."""

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    options: dict[str, Any] = field(default_factory=lambda: _GQA)
    gated: bool = True
    activation: str = "silu"
    kind: str = "module"
    stacks: tuple[str, ...] = ("decoder",)
    biased: bool = False  # the down projection has a bias
    layers: tuple[tuple[int, ...], ...] = ((0,), (1,))  # of the sites of one stack


def _encoder(config: type[PreTrainedConfig], model: type[PreTrainedModel], **options: Any) -> Tiny:
    return Tiny(config, model, {**_BASE, **options}, False, "gelu", "split", ("encoder",), True)


_BOTH = ("encoder", "decoder")
_ALBERT = {**_BASE, "num_hidden_layers": 6, "embedding_size": 16, "hidden_act": "gelu_new"}
_MODERN = {**_BASE, "global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2}

TINY: dict[str, Tiny] = {
    "llama": Tiny(hf.LlamaConfig, hf.LlamaForCausalLM),
    "llama-bias": Tiny(hf.LlamaConfig, hf.LlamaForCausalLM, {**_GQA, "mlp_bias": True}, biased=True),
    "llama-base": Tiny(hf.LlamaConfig, hf.LlamaModel),
    "llama-classify": Tiny(hf.LlamaConfig, hf.LlamaForSequenceClassification),
    "mistral": Tiny(hf.MistralConfig, hf.MistralForCausalLM),
    "qwen2": Tiny(hf.Qwen2Config, hf.Qwen2ForCausalLM),
    "qwen3": Tiny(hf.Qwen3Config, hf.Qwen3ForCausalLM, _GEMMA),
    "gemma": Tiny(hf.GemmaConfig, hf.GemmaForCausalLM, _GEMMA, activation="gelu_pytorch_tanh"),
    "gemma2": Tiny(hf.Gemma2Config, hf.Gemma2ForCausalLM, _GEMMA2, activation="gelu_pytorch_tanh"),
    "gemma3_text": Tiny(hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, _GEMMA2, activation="gelu_pytorch_tanh"),
    "gemma3": Tiny(hf.Gemma3Config, hf.Gemma3ForConditionalGeneration, _GEMMA3, activation="gelu_pytorch_tanh"),
    "phi3": Tiny(hf.Phi3Config, hf.Phi3ForCausalLM),
    "glm4": Tiny(hf.Glm4Config, hf.Glm4ForCausalLM, _GEMMA),
    "phi": Tiny(hf.PhiConfig, hf.PhiForCausalLM, gated=False, activation="gelu_new", biased=True),
    "olmo": Tiny(hf.OlmoConfig, hf.OlmoForCausalLM),
    "olmo2": Tiny(hf.Olmo2Config, hf.Olmo2ForCausalLM),
    "olmo3": Tiny(hf.Olmo3Config, hf.Olmo3ForCausalLM),
    "granite": Tiny(hf.GraniteConfig, hf.GraniteForCausalLM, {**_GQA, "mlp_bias": True}, biased=True),
    "smollm3": Tiny(hf.SmolLM3Config, hf.SmolLM3ForCausalLM),
    "stablelm": Tiny(hf.StableLmConfig, hf.StableLmForCausalLM),
    "cohere": Tiny(hf.CohereConfig, hf.CohereForCausalLM),
    "starcoder2": Tiny(
        hf.Starcoder2Config, hf.Starcoder2ForCausalLM, gated=False, activation="gelu_pytorch_tanh", biased=True
    ),
    "gpt2": Tiny(hf.GPT2Config, hf.GPT2LMHeadModel, _GPT2, False, "gelu_new", biased=True),
    "gpt_neox": Tiny(hf.GPTNeoXConfig, hf.GPTNeoXForCausalLM, _BASE, False, "gelu", biased=True),
    "opt": Tiny(hf.OPTConfig, hf.OPTForCausalLM, _OPT, False, "relu", "inline", biased=True),
    "bert": _encoder(hf.BertConfig, hf.BertForMaskedLM),
    "bert-classify": _encoder(hf.BertConfig, hf.BertForSequenceClassification),
    "bert-base": _encoder(hf.BertConfig, hf.BertModel),
    "roberta": _encoder(hf.RobertaConfig, hf.RobertaForMaskedLM),
    "roberta-classify": _encoder(hf.RobertaConfig, hf.RobertaForSequenceClassification),
    "xlm-roberta": _encoder(hf.XLMRobertaConfig, hf.XLMRobertaForMaskedLM),
    "camembert": _encoder(hf.CamembertConfig, hf.CamembertForMaskedLM),
    "electra": _encoder(hf.ElectraConfig, hf.ElectraForMaskedLM, embedding_size=16),
    "deberta-v2": _encoder(hf.DebertaV2Config, hf.DebertaV2ForMaskedLM, **_DEBERTA),
    "distilbert": Tiny(
        hf.DistilBertConfig, hf.DistilBertForMaskedLM, _DISTIL, False, "gelu", stacks=("encoder",), biased=True
    ),
    "albert": Tiny(
        hf.AlbertConfig,
        hf.AlbertForMaskedLM,
        _ALBERT,
        gated=False,
        activation="gelu_new",
        kind="inline",
        stacks=("encoder",),
        biased=True,
        layers=((0, 1, 2, 3, 4, 5),),
    ),
    "albert-groups": Tiny(
        hf.AlbertConfig,
        hf.AlbertForSequenceClassification,
        {**_ALBERT, "num_hidden_groups": 2},
        gated=False,
        activation="gelu_new",
        kind="inline",
        stacks=("encoder",),
        biased=True,
        layers=((0, 1, 2), (3, 4, 5)),
    ),
    "modernbert": Tiny(hf.ModernBertConfig, hf.ModernBertForMaskedLM, _MODERN, activation="gelu", stacks=("encoder",)),
    "modernbert-bias": Tiny(
        hf.ModernBertConfig,
        hf.ModernBertForMaskedLM,
        {**_MODERN, "mlp_bias": True},
        activation="gelu",
        stacks=("encoder",),
        biased=True,
    ),
    "t5-plain": Tiny(hf.T5Config, hf.T5ForConditionalGeneration, _T5_IDS, False, "relu", stacks=_BOTH),
    "t5-gated": Tiny(
        hf.T5Config,
        hf.T5ForConditionalGeneration,
        {**_T5_IDS, "feed_forward_proj": "gated-gelu"},
        activation="gelu_new",
        stacks=_BOTH,
    ),
    "t5-encoder": Tiny(hf.T5Config, hf.T5EncoderModel, _T5_IDS, False, "relu", stacks=("encoder",)),
    "mt5": Tiny(hf.MT5Config, hf.MT5ForConditionalGeneration, _T5_IDS, activation="gelu_new", stacks=_BOTH),
    "umt5": Tiny(hf.UMT5Config, hf.UMT5ForConditionalGeneration, _T5_IDS, activation="gelu_new", stacks=_BOTH),
}


def tiny_config(family: str) -> PreTrainedConfig:
    """The config of a tiny model, with ``architectures`` set as a checkpoint on disk would have it."""
    tiny = TINY[family]
    config = tiny.config(**tiny.options)
    config.architectures = [tiny.model.__name__]
    return config


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random model in float32 and eval mode, the same for the same seed. Biases and norms are random as well."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TINY[family].model(tiny_config(family)).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape)
                if parameter.dim() < 2:
                    parameter.add_(0.1 * noise)
                else:
                    parameter.copy_(0.15 * noise)
    return model


def tiny_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Keyword arguments for ``model(**inputs)``: 2 sequences of 7 tokens, and decoder tokens where it takes them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (2, 7), generator=generator)  # no special token, no image token
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder and hasattr(model, "decoder"):
        inputs["decoder_input_ids"] = torch.randint(3, 90, (2, 5), generator=generator)
    return inputs


def tiny_output(model: PreTrainedModel) -> Tensor:
    """What the model says on its tiny inputs: logits (2, 7 or 5, VOCAB), labels (2, 2) or states (2, 7, HIDDEN)."""
    with torch.no_grad():
        output = model(**tiny_inputs(model))
    return output.logits if "logits" in output else output.last_hidden_state
