"""Every family, one suite: all experts on is the dense model, nothing dense is left, and what is saved comes back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from factormix import load
from factormix.ffn import find_sites, get, isolate, weights
from factormix.nn import FactorMixMixin, Layout, SparseFFN
from tests.families import TINY, tiny_inputs, tiny_model, tiny_output
from tests.nn.sparse import random_assignment, sparse_ffn, sparsify, twins

every_family = pytest.mark.parametrize("family", TINY)
ALL_ON = ["S0A4E4", "S1A7E8", "S4A0E4"]


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def plain(config: object) -> object:
    """A config without what loading adds: where it came from, and the dtype of parts of a composite model."""
    if not isinstance(config, dict):
        return config
    return {k: plain(v) for k, v in config.items() if k not in ("_name_or_path", "dtype")}


def aligned(model: PreTrainedModel) -> PreTrainedModel:
    """The same values in memory of their own: in a mapped file a tensor may start at any multiple of 4 bytes, and then
    a matrix product adds in another order."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@every_family
def test_all_on_equals_dense_at_each_ffn_and_at_the_end(family: str) -> None:
    dense = tiny_model(family)
    sites = find_sites(dense)
    inputs: dict[int, Tensor] = {}
    for site in sites:
        isolate(dense, site).register_forward_pre_hook(lambda _m, args, i=site.index: inputs.update({i: args[0]}))
    want = tiny_output(dense)
    for site in sites:  # on the real inputs of each FFN
        for layout in ALL_ON:
            ffn = sparse_ffn(site, weights(dense, site), Layout.parse(layout), seed=site.index)
            with torch.no_grad():
                assert relative(ffn(inputs[site.index]), get(dense, site)(inputs[site.index])) <= 1e-5
    for layout in ALL_ON:
        assert relative(tiny_output(sparsify(tiny_model(family), layout)), want) <= 1e-4


@every_family
def test_fewer_experts_change_the_output(family: str) -> None:
    """The test above could pass with an FFN that does nothing; this one could not."""
    dense, sparse = twins(family, "S1A1E4")
    assert relative(tiny_output(sparse), tiny_output(dense)) > 1e-3


@every_family
def test_no_dense_ffn_is_left(family: str) -> None:
    dense, sparse = twins(family, "S1A2E8")
    sites = find_sites(dense)
    count = sum(p.numel() for p in sparse.parameters()) - sum(p.numel() for p in dense.parameters())
    assert count == sum(7 * site.hidden for site in sites)  # the routers (7, H) and nothing else
    ffns = [m for m in sparse.modules() if isinstance(m, SparseFFN)]
    assert len(ffns) == len(sites) == len(sparse.sparse_ffns())
    for ffn in ffns:
        for tensor in ffn.state_dict().values():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()  # no view of the dense


@every_family
def test_what_is_saved_comes_back(family: str, tmp_path: Path) -> None:
    _, sparse = twins(family, "S1A2E4")
    want = tiny_output(sparse)
    sparse.save_pretrained(tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert relative(tiny_output(loaded), want) <= 1e-6
    assert torch.equal(tiny_output(aligned(loaded)), want)
    assert type(loaded) is type(sparse) and isinstance(loaded, (FactorMixMixin, TINY[family].model))
    assert not loaded.training
    assert plain(loaded.config.to_dict()) == plain(sparse.config.to_dict())
    loaded.save_pretrained(tmp_path / "again")
    first, second = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("m", "again"))
    assert plain(first) == plain(second)
    assert str(tmp_path) not in str(second)  # nobody else has that folder
    assert torch.equal(tiny_output(aligned(load(tmp_path / "again"))), want)


@every_family
def test_the_output_is_of_the_familys_own_type(family: str) -> None:
    dense, sparse = twins(family)
    inputs = tiny_inputs(dense)
    with torch.no_grad():
        one, other = dense(**inputs), sparse(**inputs)
    assert type(one) is type(other) and list(one) == list(other)


def test_only_some_layers_may_be_sparse(tmp_path: Path) -> None:
    from factormix.factor.assemble import assemble, sparse_spec
    from factormix.ffn import swap
    from factormix.nn import adopt

    model = tiny_model("bert")
    (site,) = find_sites(model, layers=[1])
    spec = sparse_spec(site, Layout.parse("S0A1E2"), "hard")
    swap(model, site, assemble(spec, weights(model, site), random_assignment(64, spec.layout)))
    adopt(model, {site: spec}, {})
    want = tiny_output(model)
    model.save_pretrained(tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert list(loaded.sparse_ffns()) == [1]
    assert torch.equal(tiny_output(aligned(loaded)), want)
