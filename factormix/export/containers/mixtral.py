"""Mixtral: Mistral's attention with its sliding window; softmax over all experts, top K renormalised; none shared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from factormix.export.container import Block, Container
from factormix.export.needs import Needs
from factormix.export.scoring import Scoring


class Mixtral(Container):
    """For Llama and Mistral without shared neurons."""

    name = "mixtral"
    config_class = MixtralConfig
    model_class = MixtralForCausalLM
    about = "it keeps the sliding window"
    windows = "all"
    shared = "no"

    def scoring(self, needs: Needs) -> Scoring:
        return Scoring("softmax")

    def own_config(self, needs: Needs) -> dict[str, Any]:
        return {
            "sliding_window": None if needs.cut_context else needs.backbone.window,
            "num_local_experts": needs.routed,
            "num_experts_per_tok": needs.active,
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
