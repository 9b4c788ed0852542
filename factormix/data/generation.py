"""generate() by a rule of our own alone, whatever the model's own generation config says."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel


def generate_by(rule: GenerationConfig, model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """The tokens (N, P + M) of `generate` for prompts ids (N, P) under mask (N, P); the model is left as it was."""
    own, was_training = model.generation_config, model.training
    model.train(False)
    # generate() fills what `rule` leaves open from the model's own
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        with torch.inference_mode():
            return model.generate(  # type: ignore[operator, no-any-return]
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=rule
            )
    finally:
        model.generation_config = own
        model.train(was_training)
