"""Healing: end-to-end distillation of a sparse model from its dense teacher (FactorLLM, step two)."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from factormix.data.packing import Packed
from factormix.factor.config import HealConfig
from factormix.run.workdir import WorkDirectory


def heal(
    student: PreTrainedModel, teacher: PreTrainedModel, text: Packed, config: HealConfig,
    *, seed: int = 0, work: WorkDirectory | None = None, quiet: bool = False,
) -> dict[str, Any]:
    raise NotImplementedError
