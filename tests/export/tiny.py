"""A tiny factored model of any family, text of random tokens for it, and its exported directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from factormix.data.packing import Packed
from factormix.export import Exported, export_model
from tests.families import TINY, tiny_config, tiny_model
from tests.nn.sparse import sparsify

WINDOW = 64


def windows(number: int = 64) -> Packed:
    """Windows of random tokens, none of them special."""
    ids = torch.randint(3, 90, (number, WINDOW), generator=torch.Generator().manual_seed(2))
    return Packed(ids, torch.ones_like(ids).bool(), ids.numel(), "")


def factored(family: str, layout: str = "S1A2E4", gate: str = "hard", **config: Any) -> PreTrainedModel:
    """A tiny factored model, its dense config changed by `config`."""
    if not config:
        return sparsify(tiny_model(family), layout, gate)
    changed = type(tiny_config(family)).from_dict({**tiny_config(family).to_dict(), **config})
    torch.manual_seed(0)
    model = TINY[family].model(changed).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.add_(0.1 * noise) if parameter.dim() < 2 else parameter.copy_(0.15 * noise)
    return sparsify(model, layout, gate)


def exported(model: PreTrainedModel, out: Path, **options: Any) -> Exported:
    """Export without a progress line, compared on 4,096 random tokens."""
    return export_model(model, out, options.pop("packed", windows()), quiet=True, **options)


def logits(model: PreTrainedModel) -> torch.Tensor:
    """(8, WINDOW, VOCAB) on random tokens."""
    with torch.no_grad():
        return model(input_ids=windows(8).input_ids).logits


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative difference in norm."""
    return float((one - other).norm() / other.norm())


def typical(one: torch.Tensor, other: torch.Tensor) -> float:
    """The median token's relative difference: a near-tie that a container decides otherwise is one token's matter."""
    return float(((one - other).norm(dim=-1) / other.norm(dim=-1)).median())
