"""GraniteMoeShared has Llama's attention with multipliers, ungated shared neurons of any width, and top K before the
softmax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import GraniteMoeSharedConfig, GraniteMoeSharedForCausalLM

from factormix.export.container import Block, Container
from factormix.export.needs import Needs
from factormix.export.scoring import Scoring


class Granite(Container):
    """Holds Llama, Mistral and Granite models."""

    name = "granite"
    config_class = GraniteMoeSharedConfig
    model_class = GraniteMoeSharedForCausalLM
    about = "it chooses experts before it scores them, so none flip, and llama.cpp keeps its rope scaling"
    router_name = "block_sparse_moe.router"
    biases = ((False, False), (True, True))
    multipliers = True
    beyond_ties = 0.0

    def scoring(self, needs: Needs) -> Scoring:
        return Scoring("topk")

    def own_config(self, needs: Needs) -> dict[str, Any]:
        backbone = needs.backbone
        return {
            "attention_bias": backbone.qkv_bias,
            "attention_multiplier": backbone.attention,
            "embedding_multiplier": backbone.embedding,
            "residual_multiplier": backbone.residual,
            "logits_scaling": backbone.logits,
            "num_local_experts": needs.routed,
            "num_experts_per_tok": needs.active,
            "intermediate_size": needs.container_width,
            "shared_intermediate_size": needs.container_shared,
        }

    def tensors(self, block: Block) -> dict[str, Tensor]:
        named = {
            "block_sparse_moe.router.weight": block.router,
            "block_sparse_moe.experts.gate_up_proj": block.gate_up,
            "block_sparse_moe.experts.down_proj": block.down,
        }
        if block.shared_gate_up is not None and block.shared_down is not None:
            named["shared_mlp.input_linear.weight"] = block.shared_gate_up
            named["shared_mlp.output_linear.weight"] = block.shared_down
        return named

    def block(self, tensors: Mapping[str, Tensor]) -> Block:
        moe = "block_sparse_moe"
        names = (f"{moe}.router.weight", f"{moe}.experts.gate_up_proj", f"{moe}.experts.down_proj")
        shared = ("shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight")
        return Block(*(tensors[name] for name in names), *(tensors.get(name) for name in shared))
