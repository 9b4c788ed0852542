"""The attention's output projection is found in every family of the table."""

from __future__ import annotations

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from factormix import FactorMixError
from factormix.ffn import find_sites
from factormix.ffn.attention import OUTPUTS, attention_output
from tests.families import HIDDEN, TINY, tiny_inputs, tiny_model


@pytest.mark.parametrize("family", TINY)
def test_found_and_run_as_often_as_the_ffn(family: str) -> None:
    model = tiny_model(family)
    sites = find_sites(model)
    paths = [attention_output(model, site) for site in sites]
    assert len(set(paths)) == len(sites)
    calls = dict.fromkeys(paths, 0)

    def note(path: str):  # type: ignore[no-untyped-def]
        def hook(module: object, inputs: object, output: torch.Tensor) -> None:
            calls[path] += 1
            assert output.shape[-1] == HIDDEN

        return hook

    for path in paths:
        module = model.get_submodule(path)
        assert isinstance(module, (torch.nn.Linear, Conv1D))
        module.register_forward_hook(note(path))
    model(**tiny_inputs(model))
    assert calls == {path: site.use_count for path, site in zip(paths, sites)}


def test_an_unknown_layer_is_refused() -> None:
    model = tiny_model("llama")
    (site, *_) = find_sites(model)
    model.model.layers[0].self_attn.o_proj = None
    with pytest.raises(FactorMixError, match=f"layers.0 ends in none of {OUTPUTS[0]}"):
        attention_output(model, site)
