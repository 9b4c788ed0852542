"""A model with int8 FFNs is the model with its weights rounded; and is refused where it would be saved or trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import factormix
from factormix.export.needs import read_needs
from factormix.ffn import find_sites, weights
from factormix.nn import Int8Neurons, SparseFFN, quantize
from factormix.nn.int8 import rounded
from factormix.run.errors import FactorMixError
from tests.families import tiny_model, tiny_output
from tests.nn.sparse import sparsify

FAMILIES = ["llama-bias", "gpt2", "phi3", "opt", "bert", "albert", "modernbert-bias", "t5-gated"]


@torch.no_grad()
def round_in_place(model: PreTrainedModel) -> PreTrainedModel:
    """The FFNs' matrices rounded to int8 and back; for `weights`, rows are neurons, and those of down its columns."""
    for site in find_sites(model):
        parts = weights(model, site)
        for matrix in (parts.gate, parts.up, parts.down.T):
            if matrix is not None:
                numbers, scale = rounded(matrix)
                matrix.copy_(numbers * scale[:, None])
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_model_is_itself_rounded(family: str) -> None:
    want = tiny_output(round_in_place(tiny_model(family)))
    model = quantize(tiny_model(family))
    got = tiny_output(model)
    assert (got - want).norm() < 1e-5 * want.norm() and not torch.equal(want, tiny_output(tiny_model(family)))
    ffns = [module for module in model.modules() if isinstance(module, SparseFFN)]
    assert ffns and all(type(ffn.shared) is Int8Neurons and ffn.router is None for ffn in ffns)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("layout", ["S1A1E4", "S0A2E4", "S4A0E4"])
def test_a_sparse_model(layout: str) -> None:
    """Its FFNs and nothing else; near what it was; a second call changes nothing."""
    model = sparsify(tiny_model("llama-bias"), layout)
    other = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".mlp." not in name}
    want = tiny_output(model)
    assert quantize(model) is model
    got = tiny_output(model)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in other.items())
    assert 0 < (got - want).norm() < 0.2 * want.norm()  # of so small a model, a choice may flip
    assert torch.equal(tiny_output(quantize(model)), got)
    assert model.generate(torch.arange(5)[None], max_new_tokens=4, pad_token_id=0).shape[1] > 5


def test_a_model_of_which_some_ffns_are_sparse() -> None:
    mixed, sparse = tiny_model("llama"), sparsify(tiny_model("llama"))
    factored = dict(list(sparse.config.factormix["sites"].items())[:1])
    site = find_sites(mixed)[0]
    mixed.set_submodule(site.name, sparse.get_submodule(site.name))
    mixed.config.factormix = {"sites": factored, "made_by": {"by": "a test"}}
    mixed.__class__ = type(sparse)
    want = tiny_output(mixed)
    got = tiny_output(quantize(mixed))
    assert (got - want).norm() < 0.2 * want.norm()
    assert len(mixed.sparse_ffns()) == len(sparse.sparse_ffns()) > 1
    assert mixed.config.factormix["made_by"] == {"by": "a test"}


def test_loading_quantises_and_saving_is_refused(tmp_path: Path) -> None:
    sparse = sparsify(tiny_model("llama"))
    sparse.save_pretrained(tmp_path / "model")
    model = factormix.load(tmp_path / "model", quantize="int8", dtype=torch.bfloat16)
    ffn = next(iter(model.sparse_ffns().values()))
    assert type(ffn.experts) is Int8Neurons and ffn.router.weight.dtype == torch.bfloat16
    with pytest.raises(FactorMixError, match="a FactorMix directory does not hold"):
        model.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(FactorMixError, match="a container does not hold"):
        read_needs(model)
    with pytest.raises(FactorMixError, match="int8"):
        factormix.load(tmp_path / "model", quantize="int4")
