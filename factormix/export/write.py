"""Write a container's directory with transformers' own save, so that weights have the names that engines expect."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factormix.export.container import Container
from factormix.export.needs import Needs
from factormix.run.errors import FactorMixError


def write_container(
    folder: Path,
    container: Container,
    needs: Needs,
    state: Mapping[str, Tensor],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Write config, weights, generation config and tokenizer of the exported model.

    Args:
        folder: an existing directory.
        container, needs: the container, and the needs that determine its config.
        state: every tensor, see `container_state`.
        model: the factored model, which gives the dtype and the generation config.
        tokenizer: written beside the model with its chat template, or None.

    Raises:
        FactorMixError: the architecture in the installed transformers has other tensors.
    """
    config = container.config(needs)
    config.dtype = model.dtype
    with torch.device("meta"):
        exported = container.model_class(config)
    found = exported.load_state_dict(dict(state), strict=False, assign=True)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if set(found.missing_keys) - tied or found.unexpected_keys:
        wrong = sorted({*found.missing_keys, *found.unexpected_keys} - tied)
        raise FactorMixError(
            f"{container.model_class.__name__} of the installed transformers does not fit container {container.name!r} "
            f"({', '.join(wrong[:3])} differ). Use transformers 5.20 or later."
        )
    exported.tie_weights()
    if model.generation_config is not None:
        exported.generation_config = copy.deepcopy(model.generation_config)
    exported.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
