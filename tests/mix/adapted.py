"""Tiny models with random adapters, as the tests of mix need them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from factormix.mix.adapter_files import save_adapter
from factormix.mix.peft_tuner import MixDAConfig
from tests.families import tiny_model
from tests.nn.sparse import sparsify

FORMS = {
    "ffn": {"form": "ffn"},
    "bottleneck-neurons": {"form": "bottleneck", "reads": "neurons"},
    "bottleneck-input": {"form": "bottleneck", "reads": "input"},
}


def base_model(family: str, sparse: bool = False) -> PreTrainedModel:
    """A tiny dense model, or its factored twin."""
    return sparsify(tiny_model(family)) if sparse else tiny_model(family)


def randomise(model: PeftModel, domain: str, seed: int = 0) -> None:
    """Give an adapter weights that change the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".mixda_adapters.{domain}." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def adapted(
    model: PreTrainedModel, domain: str = "pubmed", *, form: str = "ffn", seed: int = 0, **options: Any
) -> PeftModel:
    """The model with one random adapter of width 8 at its first layer."""
    config = MixDAConfig(**{**FORMS[form], "layers": [0], "width": 8, **options})
    wrapped = get_peft_model(model, config, adapter_name=domain)
    randomise(wrapped, domain, seed)
    return wrapped


def saved(folder: Path, model: PreTrainedModel, domain: str = "pubmed", **options: Any) -> Path:
    """A random adapter's directory, made on `model`."""
    save_adapter(adapted(model, domain, **options), domain, folder / domain)
    return folder / domain
