"""Lockstep: each FFN's inputs are the student's own states, errors surface, and nothing is left behind.

Defect 3: the released teacher fed each layer the raw output of the FFN before it, without attention, residual or norm.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from factormix.factor.lockstep import Lockstep, batches_of
from factormix.ffn import FFNSite, find_sites, get, isolate, swap
from tests.families import TINY, tiny_model

FAMILIES = ["llama", "bert", "t5-gated", "albert", "albert-groups", "gpt2", "opt", "modernbert", "gemma3"]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert not set(threading.enumerate()) - before


class Other(nn.Module):
    """A replacement unlike the dense FFN, so that later states show whether it was there."""

    def __init__(self, index: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(index)
        self.weight = nn.Parameter(torch.randn(32, 32, generator=g) / 6)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.tanh(hidden_states @ self.weight)


def windows(model: PreTrainedModel, count: int = 5, length: int = 8, size: int = 2) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 90, (count, length), generator=torch.Generator().manual_seed(3))
    return batches_of(model, ids, size)


def hooked(model: PreTrainedModel, site: FFNSite, batches: list[dict[str, Tensor]]) -> list[list[Tensor]]:
    """All inputs of the module at a site, use by use, for each batch: the plain way, one forward for each."""
    found: list[list[Tensor]] = []
    handle = isolate(model, site).register_forward_pre_hook(lambda _m, args: found[-1].append(args[0].clone()))
    for batch in batches:
        found.append([])
        with torch.no_grad():
            model(**batch)
    handle.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_are_the_students_own_states(family: str) -> None:
    model, plain = tiny_model(family), tiny_model(family)
    batches = windows(model)
    sites = find_sites(model)
    with Lockstep(model, sites, batches) as steps:
        for site in sites:
            want = hooked(plain, site, batches)  # after the sites before it were replaced
            got = steps.inputs(site)
            assert len(got) == len(batches)
            for x, ones in zip(got, want, strict=True):
                assert torch.allclose(x, ones[0], rtol=1e-5, atol=1e-5)
            new = Other(site.index)
            steps.replace(site, new)
            swap(plain, site, new)
    for batch in batches:
        with torch.no_grad():
            assert torch.allclose(model(**batch)[0], plain(**batch)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "t5-gated", "bert"])
def test_later_states_depend_on_the_replacement(family: str) -> None:
    """The test above could pass on dense states; here two replacements give two different inputs."""
    found = []
    for seed in (0, 100):
        model = tiny_model(family)
        sites = find_sites(model)
        with Lockstep(model, sites, windows(model)) as steps:
            steps.inputs(sites[0])
            steps.replace(sites[0], Other(seed))
            found.append(steps.inputs(sites[1])[0])
    assert not torch.allclose(found[0], found[1], atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "bert", "albert"])
def test_on_exit_replaced_sites_are_new_and_the_others_old(family: str) -> None:
    model = tiny_model(family)
    sites = find_sites(model)
    old = [isolate(model, site) for site in sites]
    new = Other(0)
    with Lockstep(model, sites, windows(model)) as steps:
        steps.inputs(sites[0])
        assert steps.old(sites[0]) is old[0]
        steps.replace(sites[0], new)
    assert [get(model, site) for site in sites] == [new, *old[1:]]


def test_leaving_before_the_first_site_changes_nothing() -> None:
    model = tiny_model("llama")
    sites = find_sites(model)
    old = [get(model, site) for site in sites]
    with Lockstep(model, sites, windows(model)):
        pass
    assert [get(model, site) for site in sites] == old


def test_the_callers_error_leaves_the_model_usable() -> None:
    model = tiny_model("llama")
    sites, batches = find_sites(model), windows(model)
    with torch.no_grad():
        want = model(**batches[0]).logits
    with pytest.raises(ZeroDivisionError), Lockstep(model, sites, batches) as steps:
        steps.inputs(sites[0])
        raise ZeroDivisionError
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, want)


class Broken(nn.Module):
    def forward(self, *args: object, **kwargs: object) -> Tensor:
        raise KeyError("the original")


@pytest.mark.parametrize("layer", [0, 1])
def test_an_error_in_a_forward_surfaces_as_it_was(layer: int) -> None:
    model = tiny_model("llama")
    sites = find_sites(model)
    model.model.layers[layer].self_attn = Broken()
    with pytest.raises(KeyError, match="the original"), Lockstep(model, sites, windows(model)) as steps:
        for site in sites:
            steps.inputs(site)
            steps.replace(site, Other(site.index))
    assert isinstance(get(model, sites[0]), Other if layer else type(get(tiny_model("llama"), sites[0])))


def test_an_error_in_a_replacement_surfaces() -> None:
    model = tiny_model("llama")
    sites = find_sites(model)
    with pytest.raises(KeyError), Lockstep(model, sites, windows(model)) as steps:
        steps.inputs(sites[0])
        steps.replace(sites[0], Broken())


@pytest.mark.parametrize("family", ["llama", "t5-gated", "albert-groups"])
def test_done_sites_do_not_halt(family: str) -> None:
    """A resumed run: what was done is there, and the next site's inputs are those of an uninterrupted run."""
    whole, resumed = tiny_model(family), tiny_model(family)
    sites, batches = find_sites(whole), windows(whole)
    new = {site.index: Other(site.index) for site in sites}
    last = sites[-1]
    with Lockstep(whole, sites, batches) as steps:
        for site in sites[:-1]:
            steps.inputs(site)
            steps.replace(site, new[site.index])
        want = steps.inputs(last)
    done = {i: ffn for i, ffn in new.items() if i != last.index}
    with Lockstep(resumed, sites, batches, done) as steps:
        got = steps.inputs(last)
        steps.replace(last, new[last.index])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(got, want, strict=True))
    assert [get(resumed, site) for site in sites] == [new[site.index] for site in sites]


def test_everything_done_runs_nothing() -> None:
    model = tiny_model("llama")
    sites = find_sites(model)
    done = {site.index: Other(site.index) for site in sites}
    with Lockstep(model, sites, windows(model), done):
        pass
    assert [get(model, site) for site in sites] == list(done.values())


def test_each_batch_crosses_each_layer_once() -> None:
    model = tiny_model("llama")
    sites, batches = find_sites(model), windows(model)
    calls = [0, 0]
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(
            lambda _m, _args, _kw, i=i: calls.__setitem__(i, calls[i] + 1), with_kwargs=True
        )
    with Lockstep(model, sites, batches) as steps:
        for site in sites:
            steps.inputs(site)
            steps.replace(site, Other(site.index))
    assert calls == [3, 3]  # not 3 forwards for each site


def test_no_gradient_and_the_callers_threads_settings() -> None:
    model = tiny_model("llama")
    sites, seen = find_sites(model), []
    model.model.norm.register_forward_pre_hook(
        lambda _m, args: seen.append((torch.is_grad_enabled(), torch.get_num_threads()))
    )
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_pre_hook(
            lambda _m, args: seen.append((torch.is_grad_enabled(), torch.get_num_threads()))
        )
    before = torch.get_num_threads()
    torch.set_num_threads(3)  # no thread's default
    try:
        with torch.enable_grad(), Lockstep(model, sites, windows(model)) as steps:
            for site in sites:
                assert not any(x.requires_grad for x in steps.inputs(site))
                steps.replace(site, Other(site.index))
    finally:
        torch.set_num_threads(before)
    assert seen and set(seen) == {(False, 3)}


@pytest.mark.parametrize("family", TINY)
def test_batches_fit_every_family(family: str) -> None:
    model = tiny_model(family)
    ids = torch.randint(3, 90, (5, 9), generator=torch.Generator().manual_seed(0))
    batches = batches_of(model, ids, 2)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    for batch in batches:
        with torch.no_grad():
            out = model(**batch)
        assert out.get("past_key_values") is None  # a cache would hold every layer's states
    rows = [torch.cat([b[name] for name in ("input_ids", "decoder_input_ids") if name in b], 1) for b in batches]
    assert torch.equal(torch.cat(rows), ids)  # an encoder-decoder reads the first part and decodes the rest
