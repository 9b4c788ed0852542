"""Mixtral has Mistral's attention with its sliding window, and no shared experts. Its softmax weights of the top K are
renormalised."""

from __future__ import annotations

from typing import Any

from transformers import MixtralConfig, MixtralForCausalLM

from factormix.export.container import Unshared
from factormix.export.needs import Needs


class Mixtral(Unshared):
    """Holds Llama and Mistral models without shared neurons."""

    name = "mixtral"
    config_class = MixtralConfig
    model_class = MixtralForCausalLM
    about = "it keeps the sliding window"
    windows = "all"

    def own_config(self, needs: Needs) -> dict[str, Any]:
        return {
            "sliding_window": None if needs.cut_context else needs.backbone.window,
            "num_local_experts": needs.routed,
            "num_experts_per_tok": needs.active,
            "intermediate_size": needs.container_width,
        }
