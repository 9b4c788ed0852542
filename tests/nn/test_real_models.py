"""All experts on is the dense model, on real models: FFN by FFN, at the end, and for 64 greedy tokens. Fetches them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from factormix.assets.fetch import fetch
from factormix.ffn import find_sites, get, isolate, weights
from factormix.nn import Layout
from tests.nn.sparse import sparse_ffn, sparsify

TEXT = "The old lighthouse keeper climbed the stairs every evening, and when he reached the top"
ALL_ON = "S4A12E16"
pytestmark = pytest.mark.download
every_model = pytest.mark.parametrize("name", ["smollm2", "minilm", "gemma3"])


def pretrained(name: str) -> PreTrainedModel:
    auto = AutoModel if name == "minilm" else AutoModelForCausalLM
    return auto.from_pretrained(fetch(name, quiet=True), dtype=torch.float32).eval()


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def output(model: PreTrainedModel, name: str) -> Tensor:
    ids = AutoTokenizer.from_pretrained(fetch(name, quiet=True))(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        return model(input_ids=ids)[0]


@every_model
def test_all_on_equals_dense(name: str) -> None:
    dense = pretrained(name)
    sites, inputs = find_sites(dense), {}
    handles = [
        isolate(dense, site).register_forward_pre_hook(lambda _m, args, i=site.index: inputs.update({i: args[0]}))
        for site in sites
    ]
    want = output(dense, name)
    for handle in handles:
        handle.remove()
    for site in sites:
        ffn = sparse_ffn(site, weights(dense, site), Layout.parse(ALL_ON), seed=site.index)
        with torch.no_grad():
            assert relative(ffn(inputs[site.index]), get(dense, site)(inputs[site.index])) <= 1e-5, site.name
    assert relative(output(sparsify(dense, ALL_ON), name), want) <= 1e-4


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_sixty_four_greedy_tokens_are_the_dense_models(name: str) -> None:
    """Equal, or the first that differs is a tie of the dense model: its two best logits less than 1e-3 apart."""
    ids = AutoTokenizer.from_pretrained(fetch(name, quiet=True))(TEXT, return_tensors="pt").input_ids
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    dense = pretrained(name)
    found = dense.generate(ids, **options, output_logits=True, return_dict_in_generate=True)
    want = found.sequences[0, ids.shape[1] :]  # (64,)
    got = sparsify(dense, ALL_ON).generate(ids, **options)[0, ids.shape[1] :]  # (64,)
    assert len(want) == len(got) == 64
    differ = (want != got).nonzero().flatten()
    if len(differ):
        best = found.logits[int(differ[0])][0].topk(2).values
        assert float(best[0] - best[1]) < 1e-3, f"token {int(differ[0])} differs and is no tie"
