"""Qwen3-MoE has query and key norms by head, and no shared experts. Its weights of the top K are renormalised."""

from __future__ import annotations

from typing import Any

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from factormix.export.container import Unshared
from factormix.export.needs import Needs


class Qwen3Moe(Unshared):
    """Holds Qwen3 models without shared neurons."""

    name = "qwen3_moe"
    config_class = Qwen3MoeConfig
    model_class = Qwen3MoeForCausalLM
    about = "it is Qwen3's own mixture, with its query and key norms"
    qk_norms = ("head",)
    biases = ((False, False), (True, True))
    windows = "all"

    def own_config(self, needs: Needs) -> dict[str, Any]:
        window = None if needs.cut_context else needs.backbone.window
        return {
            "attention_bias": needs.backbone.qkv_bias,
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "num_experts": needs.routed,
            "num_experts_per_tok": needs.active,
            "norm_topk_prob": True,
            "moe_intermediate_size": needs.container_width,
            "intermediate_size": needs.container_width,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
