"""Bytes and operations are those of what really ran."""

import pytest
import torch
from transformers import DynamicCache

from factormix.evaluate.cost import bytes_per_token
from factormix.evaluate.roofline import ExpertsHit, cache_bytes, decode_bytes
from tests.evaluate.tiny import HIDDEN, LAYERS


@torch.no_grad()
def test_distinct_experts_are_counted_call_by_call(sparse_llama):
    first, second = (layer.mlp for layer in sparse_llama.model.layers)
    calls = [torch.randn(1, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens)) for tokens in (9, 1, 6)]
    with ExpertsHit(sparse_llama) as seen:
        for x in calls:
            first(x)
    distinct = [len(set(first.router(x[0])[1].flatten().tolist())) / 4 for x in calls]
    assert seen.share() == {first: pytest.approx(sum(distinct) / 3)}
    assert seen.share(skip=1) == {first: pytest.approx(sum(distinct[1:]) / 2)}
    assert seen.share(skip=3) == {}
    first(calls[0])  # hooks are gone
    assert seen.share() == {first: pytest.approx(sum(distinct) / 3)}
    assert second not in seen.share()


def test_bytes_follow_the_experts_hit(sparse_llama):
    ffns = [layer.mlp for layer in sparse_llama.model.layers]
    routed = sum(p.numel() for p in ffns[0].experts.parameters()) * 4
    one, all_of_them = (decode_bytes(sparse_llama, 3, dict.fromkeys(ffns, share), 100.0) for share in (0.25, 1.0))
    assert one == pytest.approx(bytes_per_token(sparse_llama) + 100)
    assert all_of_them - one == pytest.approx(LAYERS * 0.75 * routed)
    assert decode_bytes(sparse_llama, 3, {}, 0.0) == bytes_per_token(sparse_llama, 3)  # not counted: expected


@torch.no_grad()
def test_bytes_of_a_cache(llama):
    model = llama()
    cache = DynamicCache(config=model.config)
    assert cache_bytes(cache) == 0
    model(input_ids=torch.zeros(2, 5, dtype=torch.long), past_key_values=cache, use_cache=True)
    assert cache_bytes(cache) == 2 * 5 * LAYERS * 2 * HIDDEN * 4
