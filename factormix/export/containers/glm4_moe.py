"""GLM-4-MoE has query and key norms by head or none, ungated shared neurons, and sigmoid scores.

The config sets the scale of the weights (routed_scaling_factor), so a hard gate leaves the experts unchanged. A soft
gate is the container's own form without renormalisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from factormix.export.container import ROUTED, Block, Container, routed_tensors
from factormix.export.needs import Needs
from factormix.export.scoring import Scoring


class Glm4Moe(Container):
    """Holds Qwen3 and Qwen2 models, and on request Llama and Mistral. Only this container holds the soft gate."""

    name = "glm4_moe"
    config_class = Glm4MoeConfig
    model_class = Glm4MoeForCausalLM
    about = "it has query and key norms and ungated shared neurons"
    qk_norms = ("head", "none")
    biases = ((False, False), (True, False))
    shared = "always"
    soft = True
    flips = beyond_ties = 3e-3

    def scoring(self, needs: Needs) -> Scoring:
        if needs.gate == "soft":
            return Scoring("sigmoid", renormalised=False)
        return Scoring("sigmoid", scale=float(needs.active))

    def own_config(self, needs: Needs) -> dict[str, Any]:
        backbone, scoring = needs.backbone, self.scoring(needs)
        rope = dict(backbone.common["rope_parameters"] or {}, partial_rotary_factor=1.0)  # GLM-4's default is 0.5
        return {
            "rope_parameters": rope,
            "partial_rotary_factor": 1.0,
            "attention_bias": backbone.qkv_bias,
            "use_qk_norm": backbone.qk_norm == "head",
            "n_routed_experts": needs.routed,
            "n_shared_experts": -(-needs.container_shared // needs.container_width),
            "num_experts_per_tok": needs.active,
            "norm_topk_prob": scoring.renormalised,
            "routed_scaling_factor": scoring.scale,
            "moe_intermediate_size": needs.container_width,
            "intermediate_size": needs.container_width,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "num_mtp_layers": 0,
        }

    def tensors(self, block: Block) -> dict[str, Tensor]:
        assert block.shared_gate_up is not None and block.shared_down is not None
        gate, up = block.shared_gate_up.chunk(2)  # (S, H) each
        width = block.down.shape[-1]
        pad = -len(gate) % width  # the shared part must be whole experts wide
        wide = torch.nn.functional.pad
        return {
            **routed_tensors(block),
            "mlp.gate.e_score_correction_bias": block.router.new_zeros(len(block.router)),
            "mlp.shared_experts.gate_proj.weight": wide(gate, (0, 0, 0, pad)),
            "mlp.shared_experts.up_proj.weight": wide(up, (0, 0, 0, pad)),
            "mlp.shared_experts.down_proj.weight": wide(block.shared_down, (0, pad)),
        }

    def block(self, tensors: Mapping[str, Tensor]) -> Block:
        gate, up, down = (tensors[f"mlp.shared_experts.{part}_proj.weight"] for part in ("gate", "up", "down"))
        router, gate_up, experts_down = (tensors[name] for name in ROUTED)
        return Block(router, gate_up, experts_down, torch.cat([gate, up]), down)
