"""Qwen2-MoE has q, k, v biases and a shared expert under a sigmoid gate. Its softmax weights are not renormalised.

The shared expert's gate weights are zero, so the gate is 0.5, and its down projection is doubled: this is exact.
transformers and vLLM can renormalise the weights, but llama.cpp's qwen2moe cannot, so this container does not. A model
without q, k, v biases gets zeros there, because vLLM needs them. A model without shared neurons gets a few zero ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from factormix.export.container import ROUTED, Block, Container, routed_tensors
from factormix.export.needs import Needs
from factormix.export.scoring import Scoring

LEAST_SHARED = 32  # zero neurons of a model without shared ones, because llama.cpp reads a width of 0 as missing


class Qwen2Moe(Container):
    """Holds Qwen2 models, and on request Llama and Mistral."""

    name = "qwen2_moe"
    config_class = Qwen2MoeConfig
    model_class = Qwen2MoeForCausalLM
    about = "it is Qwen2's own mixture, with its attention biases"
    biases = ((True, False), (False, False))
    qkv_zeros = True
    windows = "layers"

    def scoring(self, needs: Needs) -> Scoring:
        return Scoring("softmax", renormalised=False)

    def own_config(self, needs: Needs) -> dict[str, Any]:
        backbone = needs.backbone
        window = None if needs.cut_context else backbone.window
        kinds = {True: "sliding_attention", False: "full_attention"}
        return {
            "qkv_bias": True,
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "layer_types": [kinds[w and window is not None] for w in backbone.windowed] or None,
            "num_experts": needs.routed,
            "num_experts_per_tok": needs.active,
            "norm_topk_prob": False,
            "moe_intermediate_size": needs.container_width,
            "intermediate_size": needs.container_width,
            "shared_expert_intermediate_size": needs.container_shared or LEAST_SHARED,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }

    def tensors(self, block: Block) -> dict[str, Tensor]:
        gate_up, down = block.shared_gate_up, block.shared_down
        if gate_up is None or down is None:
            hidden = block.down.shape[1]
            gate_up, down = block.down.new_zeros(2 * LEAST_SHARED, hidden), block.down.new_zeros(hidden, LEAST_SHARED)
        gate, up = gate_up.chunk(2)  # (S, H) each
        return {
            **routed_tensors(block),
            "mlp.shared_expert.gate_proj.weight": gate,
            "mlp.shared_expert.up_proj.weight": up,
            "mlp.shared_expert.down_proj.weight": 2 * down,
            "mlp.shared_expert_gate.weight": gate.new_zeros(1, gate.shape[1]),
        }

    def block(self, tensors: Mapping[str, Tensor]) -> Block:
        gate, up = (tensors[f"mlp.shared_expert.{half}_proj.weight"] for half in ("gate", "up"))
        down = tensors["mlp.shared_expert.down_proj.weight"] / 2
        router, gate_up, experts_down = (tensors[name] for name in ROUTED)
        return Block(router, gate_up, experts_down, torch.cat([gate, up]), down)
