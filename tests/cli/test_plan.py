"""The arithmetic behind --dry-run."""

from __future__ import annotations

import pytest

from factormix.cli.plan import TRAINING_BYTES, estimated_bytes
from factormix.factor.config import FactorConfig
from factormix.ffn.cost import Inspection, inspect_model
from tests.families import tiny_model

UNIFORM = FactorConfig.parse("S1A1E4", allocation="uniform", tokens=1024, window=64)


@pytest.fixture(scope="module")
def llama() -> Inspection:
    return inspect_model(tiny_model("llama").config)


def memory(found: Inspection, dtype: str = "float32", **changes: object) -> int:
    return estimated_bytes(found, UNIFORM.replace(**changes), dtype)


def test_memory_grows_with_what_needs_it(llama: Inspection) -> None:
    least = memory(llama)
    assert least > 4 * llama.parameters
    for changes in ({"tokens": 2048}, {"allocation": "global"}, {"heal": {"tokens": 512}}):
        assert memory(llama, **changes) > least, changes
    assert memory(llama, layer_fit=False) < least and memory(llama, "bfloat16") < least
    assert memory(llama, window=128) == least  # states are kept, graphs are not: nothing crosses layers here
    wider = {"allocation": "global", "window": 128}
    assert memory(llama, **wider) > memory(llama, allocation="global")


def test_healing_holds_the_dense_ffns_and_the_optimiser(llama: Inspection) -> None:
    """Beside the window's graph, which a shared-out budget needs as well."""
    both = memory(llama, allocation="global", heal={"tokens": 512}) - memory(llama, allocation="global")
    assert both == llama.ffn_parameters * (4 + TRAINING_BYTES)
