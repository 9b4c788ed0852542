"""The FactorMix model class: the family's own class with some FFNs made sparse.

``factormix_class(LlamaForCausalLM)`` is a subclass of it, so generate, caches, Trainer, PEFT target names and
gradient checkpointing work as that family's do. Which FFNs are sparse, and their shapes, stand in
``config.factormix = {"sites": {"0": {...SparseSpec...}, ...}, "made_by": {...}}``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from factormix.ffn import FFNSite, find_sites, get, swap
from factormix.nn.sparse_ffn import SparseFFN, SparseSpec


class FactorMixMixin:
    """What a FactorMix model has beyond its family's class."""

    config: PretrainedConfig
    write_directory: ClassVar[Callable[..., None]]
    """`factormix.checkpoint.save`, which sets this: nothing here imports the floor above."""

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        specs = {int(i): SparseSpec.from_dict(spec) for i, spec in config.factormix["sites"].items()}
        for site in find_sites(cast(nn.Module, self)):
            if site.index in specs:
                swap(cast(nn.Module, self), site, SparseFFN(specs[site.index]))

    def sparse_ffns(self) -> dict[int, SparseFFN]:
        """The sparse FFNs by site index, front to back."""
        found = [m for m in cast(nn.Module, self).modules() if isinstance(m, SparseFFN)]
        return dict(zip(sorted(map(int, self.config.factormix["sites"])), found, strict=True))

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write a FactorMix directory, atomically and with hashes; see `factormix.checkpoint.save`."""
        type(self).write_directory(self, save_directory, **kwargs)


def factormix_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The FactorMix subclass of a transformers model class, e.g. FactorMixLlamaForCausalLM; one for each class."""
    if base in _CLASSES:
        return _CLASSES[base]
    body = {"__module__": __name__, "__doc__": base.__doc__}
    _CLASSES[base] = cast(type[PreTrainedModel], type(f"FactorMix{base.__name__}", (FactorMixMixin, base), body))
    return _CLASSES[base]


_CLASSES: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}


def base_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The family's own class of a FactorMix model (or of a dense one)."""
    return cast(type[PreTrainedModel], next(c for c in type(model).__mro__ if "FactorMix" not in c.__name__))


def sites_of(model: PreTrainedModel) -> list[FFNSite]:
    """The FFNs of a dense or FactorMix model, front to back; a factored one has those of its dense form."""
    if not isinstance(model, FactorMixMixin):
        return find_sites(model)
    with torch.device("meta"):
        return find_sites(base_class(model)(model.config))


def vocabulary_head(model: PreTrainedModel) -> Literal["causal", "seq2seq", "masked"] | None:
    """What a model's head over the vocabulary predicts: the next token, the next of a second text, or masked ones.
    None for a model without such a head."""
    name = base_class(model).__name__
    for kind, names in _HEADS.items():
        if name in names:
            return kind
    return None


_HEADS: dict[Literal["causal", "seq2seq", "masked"], set[str]] = {
    "causal": set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()),
    "seq2seq": set(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()),
    "masked": set(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()),
}


def adopt(model: PreTrainedModel, sites: dict[FFNSite, SparseSpec], made_by: dict[str, Any]) -> None:
    """Turn a model whose FFNs were just swapped for SparseFFNs into its FactorMix class, in place.

    Raises:
        AssertionError: a site does not hold a SparseFFN of its spec (a defect of the caller).
    """
    for site, spec in sites.items():
        ffn = get(model, site)
        assert isinstance(ffn, SparseFFN) and ffn.spec == spec, site.name
    model.config.factormix = {
        "sites": {str(site.index): spec.to_dict() for site, spec in sites.items()},
        "made_by": made_by,
    }
    model.__class__ = factormix_class(base_class(model))
