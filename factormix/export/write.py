"""Write a container's directory: transformers' own save, so weights have the names that engines expect."""

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
    """Config, weights, generation config and tokenizer of the exported model.

    Args:
        folder: an existing directory.
        container, needs: what is written.
        state: every tensor, see `container_state`.
        model: the factored model; its dtype and generation config are taken over.
        tokenizer: written beside the model, with its chat template.

    Raises:
        FactorMixError: this transformers has another architecture under the container's name.
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
            f"this transformers' {container.model_class.__name__} has other tensors than {container.name!r} is written "
            f"with ({', '.join(wrong[:3])}). Use transformers 5.20 or later."
        )
    exported.tie_weights()
    if model.generation_config is not None:
        exported.generation_config = copy.deepcopy(model.generation_config)
    exported.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
