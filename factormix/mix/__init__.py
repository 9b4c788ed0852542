"""MixDA: domain knowledge beside frozen FFNs (stage 1), and merging it into them.

The names below are imported when they are first used: they bring PEFT along, which most of FactorMix does without.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from factormix.mix.adapter_files import load_adapters, save_adapter
    from factormix.mix.config import InjectConfig
    from factormix.mix.merge import merge_adapters
    from factormix.mix.peft_tuner import MixDAConfig
    from factormix.mix.stage1 import inject

_HOME = {
    "InjectConfig": "config",
    "MixDAConfig": "peft_tuner",
    "inject": "stage1",
    "load_adapters": "adapter_files",
    "merge_adapters": "merge",
    "save_adapter": "adapter_files",
}
__all__ = ["InjectConfig", "MixDAConfig", "inject", "load_adapters", "merge_adapters", "save_adapter"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
