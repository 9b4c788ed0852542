"""FlexOlmo has OLMo-2's norms after attention and FFN, and no shared experts. Its softmax weights of the top K are
renormalised."""

from __future__ import annotations

from typing import Any

from transformers import FlexOlmoConfig, FlexOlmoForCausalLM

from factormix.export.container import Unshared
from factormix.export.needs import Needs


class FlexOlmo(Unshared):
    """Holds OLMo-2 models without shared neurons."""

    name = "flex_olmo"
    config_class = FlexOlmoConfig
    model_class = FlexOlmoForCausalLM
    about = "it is OLMo-2's own mixture, with its norms after attention and FFN"
    qk_norms = ("whole",)
    norm = "after"
    biases = ((False, False), (True, True))

    def own_config(self, needs: Needs) -> dict[str, Any]:
        return {
            "attention_bias": needs.backbone.qkv_bias,
            "num_experts": needs.routed,
            "num_experts_per_tok": needs.active,
            "norm_topk_prob": True,
            "intermediate_size": needs.container_width,
        }
