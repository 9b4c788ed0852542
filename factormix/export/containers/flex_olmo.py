"""FlexOlmo: OLMo-2's norms, after attention and FFN; softmax over all experts, top K renormalised; none shared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import FlexOlmoConfig, FlexOlmoForCausalLM

from factormix.export.container import Block, Container
from factormix.export.needs import Needs
from factormix.export.scoring import Scoring


class FlexOlmo(Container):
    """For OLMo-2 without shared neurons."""

    name = "flex_olmo"
    config_class = FlexOlmoConfig
    model_class = FlexOlmoForCausalLM
    about = "it is OLMo-2's own mixture, with its norms after attention and FFN"
    qk_norms = ("whole",)
    norm = "after"
    biases = ((False, False), (True, True))
    shared = "no"

    def scoring(self, needs: Needs) -> Scoring:
        return Scoring("softmax")

    def own_config(self, needs: Needs) -> dict[str, Any]:
        return {
            "attention_bias": needs.backbone.qkv_bias,
            "num_experts": needs.routed,
            "num_experts_per_tok": needs.active,
            "norm_topk_prob": True,
            "intermediate_size": needs.container_width,
        }

    def tensors(self, block: Block) -> dict[str, Tensor]:
        return {
            "mlp.gate.weight": block.router,
            "mlp.experts.gate_up_proj": block.gate_up,
            "mlp.experts.down_proj": block.down,
        }

    def block(self, tensors: Mapping[str, Tensor]) -> Block:
        names = ("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
        return Block(*(tensors[name] for name in names))
