"""Neurons cut off: the FFN computes what its first ones do, however it is stored; a copy leaves its model alone."""

from __future__ import annotations

import pytest
import torch

from factormix.ffn import copy_structure, find_sites, isolate, narrow, weights
from tests.families import tiny_model


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "bert", "opt"])  # gated, Conv1D, fused, split, inline
def test_a_narrow_ffn_is_its_first_neurons(family: str) -> None:
    dense = tiny_model(family)
    model = copy_structure(dense)
    for site in find_sites(dense):
        old = weights(dense, site)
        keep = site.inner // 4
        found = narrow(model, site, keep)
        assert (found.inner, found.index) == (keep, site.index)
        assert weights(model, found).up.shape == (keep, site.hidden)
        x = torch.randn(5, site.hidden, generator=torch.Generator().manual_seed(site.index))
        expected = old.neurons(x, site.act())[:, :keep] @ old.down[:keep]  # (5, H)
        if old.down_bias is not None:
            expected = expected + old.down_bias
        assert torch.allclose(isolate(model, found)(x), expected, atol=1e-5)
        assert weights(dense, site).up.shape == (site.inner, site.hidden)
    assert {s.inner for s in find_sites(model)} == {keep}


def test_a_copy_structure_holds_the_same_tensors() -> None:
    dense = tiny_model("llama")
    copied = copy_structure(dense)
    assert all(a is b for a, b in zip(dense.parameters(), copied.parameters(), strict=True))
    assert not set(dense.modules()) & set(copied.modules()) and copied.config is not dense.config
