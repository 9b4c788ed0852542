"""MixDA: train domain knowledge beside frozen FFNs (stage 1), merge it into them, mix domains for a task (stage 2).

The names below are imported when they are first used, because they import PEFT, which most of FactorMix does not need.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from factormix.mix.adapt_config import AdaptConfig
    from factormix.mix.adapter_files import load_adapters, save_adapter
    from factormix.mix.batches import stage1_batches
    from factormix.mix.config import InjectConfig
    from factormix.mix.load import load_mix, save_mix
    from factormix.mix.merge import merge_adapters
    from factormix.mix.own_gate import fit_own_gate
    from factormix.mix.peft_tuner import MixDAConfig
    from factormix.mix.stage1 import inject
    from factormix.mix.stage2 import adapt

_HOME = {
    "AdaptConfig": "adapt_config",
    "InjectConfig": "config",
    "MixDAConfig": "peft_tuner",
    "adapt": "stage2",
    "fit_own_gate": "own_gate",
    "inject": "stage1",
    "load_adapters": "adapter_files",
    "load_mix": "load",
    "merge_adapters": "merge",
    "save_adapter": "adapter_files",
    "save_mix": "load",
    "stage1_batches": "batches",
}
__all__ = [
    "AdaptConfig",
    "InjectConfig",
    "MixDAConfig",
    "adapt",
    "fit_own_gate",
    "inject",
    "load_adapters",
    "load_mix",
    "merge_adapters",
    "save_adapter",
    "save_mix",
    "stage1_batches",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
