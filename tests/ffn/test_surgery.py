"""Every family's FFN is found, made one module bit-equally, read as views, and swapped: one suite over one table."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM
from transformers.activations import ACT2FN

from factormix.ffn import (
    FAMILIES,
    DenseFFN,
    Family,
    FFNPaths,
    FFNSite,
    FFNWeights,
    find_sites,
    get,
    isolate,
    swap,
    weights,
)
from factormix.run.errors import FactorMixError
from tests.families import HIDDEN, INNER, TINY, tiny_config, tiny_model, tiny_output

every_family = pytest.mark.parametrize("family", TINY)


class FromWeights(nn.Module):
    """An FFN built from copies of what `weights` returns."""

    def __init__(self, parts: FFNWeights, site: FFNSite) -> None:
        super().__init__()
        self.parts = FFNWeights(**{name: None if w is None else w.clone() for name, w in vars(parts).items()})
        self.act = site.act()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.parts.forward(x, self.act)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@every_family
def test_sites_are_found(family: str) -> None:
    tiny, sites = TINY[family], find_sites(tiny_model(family))
    assert [site.index for site in sites] == list(range(len(sites)))
    assert [(site.stack, site.layers) for site in sites] == [(s, used) for s in tiny.stacks for used in tiny.layers]
    for site in sites:
        assert (site.hidden, site.inner) == (HIDDEN, INNER)
        assert (site.gated, site.activation, site.kind) == (tiny.gated, tiny.activation, tiny.kind)
        assert site.use_count == len(site.layers)
        assert (site.up_bias, site.down_bias, site.gate_bias) == (tiny.biased, tiny.biased, tiny.biased and tiny.gated)
        assert pickle.loads(pickle.dumps(site)) == site


def test_every_entry_of_the_table_is_tested() -> None:
    assert set(FAMILIES) == {tiny.config.model_type for tiny in TINY.values()}


@every_family
def test_isolate_is_bit_equal_and_idempotent(family: str) -> None:
    model = tiny_model(family)
    before, sites, count = tiny_output(model), find_sites(model), sum(p.numel() for p in model.parameters())
    first = [isolate(model, site) for site in sites]
    assert torch.equal(tiny_output(model), before)
    structure = repr(model)
    assert [isolate(model, site) for site in sites] == first == [get(model, site) for site in sites]
    assert repr(model) == structure
    assert find_sites(model) == sites
    assert sum(p.numel() for p in model.parameters()) == count
    assert all(isinstance(module, DenseFFN) == (TINY[family].kind != "module") for module in first)


@every_family
def test_weights_give_the_modules_own_output_and_share_its_storage(family: str) -> None:
    model = tiny_model(family)
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for site in find_sites(model):
        before, ffn = weights(model, site), isolate(model, site)
        parts = weights(model, site)
        for name, tensor in vars(parts).items():
            earlier = getattr(before, name)
            assert (tensor is None) == (earlier is None)
            if tensor is not None:
                assert tensor.untyped_storage().data_ptr() in owned
                assert (tensor.data_ptr(), tensor.shape) == (earlier.data_ptr(), earlier.shape)
        assert sum(tensor.numel() for tensor in vars(parts).values() if tensor is not None) == site.parameters
        x = torch.randn(3, 5, HIDDEN, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            want = ffn(x)
        assert relative(parts.forward(x, site.act()), want) < 1e-6
        assert parts.neurons(x, site.act()).shape == (3, 5, INNER)


@every_family
def test_a_swapped_in_module_does_all_of_the_work(family: str) -> None:
    model = tiny_model(family)
    want, sites = tiny_output(model), find_sites(model)
    new = [FromWeights(weights(model, site), site) for site in sites]
    old = [swap(model, site, module) for site, module in zip(sites, new, strict=True)]
    owned = {id(parameter) for parameter in model.parameters()}
    assert not any(id(parameter) in owned for module in old for parameter in module.parameters())  # dense is out
    assert torch.allclose(tiny_output(model), want, rtol=1e-5, atol=1e-5)
    assert [module.calls for module in new] == [site.use_count for site in sites]
    assert [get(model, site) for site in sites] == new
    for site, module in zip(sites, old, strict=True):
        with pytest.raises(FactorMixError, match="no longer the dense one"):
            weights(model, site)
        assert swap(model, site, module) is new[site.index]
    assert torch.equal(tiny_output(model), want)


@every_family
def test_the_meta_device_will_do(family: str) -> None:
    tiny = TINY[family]
    with torch.device("meta"):
        model = tiny.model(tiny_config(family))
        sites = find_sites(model)
        for site in sites:
            isolate(model, site)
            assert weights(model, site).up.is_meta
            swap(model, site, nn.Linear(HIDDEN, HIDDEN))
    assert sites == find_sites(tiny_model(family))


@pytest.mark.parametrize("family", ["llama", "bert", "opt", "albert", "phi3", "gpt2", "modernbert-bias"])
@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(INNER)))
def test_a_permutation_of_the_neurons_changes_nothing(family: str, order: list[int]) -> None:
    model = tiny_model(family)
    want = tiny_output(model)
    for site in find_sites(model):
        parts = weights(model, site)
        for tensor in (parts.gate, parts.up, parts.down, parts.gate_bias, parts.up_bias):
            if tensor is not None:
                tensor.copy_(tensor[order])  # writes through the view into the model
    assert torch.allclose(tiny_output(model), want, rtol=1e-5, atol=1e-5)


@every_family
def test_layers_choose_sites(family: str) -> None:
    tiny, model = TINY[family], tiny_model(family)
    last = max(layer for used in tiny.layers for layer in used)
    chosen = find_sites(model, layers=tiny.layers[-1])
    assert [(site.stack, site.layers) for site in chosen] == [(stack, tiny.layers[-1]) for stack in tiny.stacks]
    assert chosen == [site for site in find_sites(model) if site.layers == tiny.layers[-1]]
    for wrong in ([last + 1], [-1], []):
        with pytest.raises(FactorMixError, match=f"layers 0 to {last}"):
            find_sites(model, layers=wrong)


def test_half_of_a_shared_ffn_cannot_be_chosen() -> None:
    with pytest.raises(FactorMixError, match="layers 3 to 5 share ONE FFN"):
        find_sites(tiny_model("albert-groups"), layers=[0, 1, 2, 4])


def test_isolating_one_layer_leaves_the_others_alone() -> None:
    model = tiny_model("opt")
    shared = nn.ReLU()
    for layer in model.model.decoder.layers:
        layer.activation_fn = shared
    first, second = find_sites(model)
    isolate(model, first)
    assert model.model.decoder.layers[1].activation_fn is shared
    with pytest.raises(FactorMixError, match="isolate"):
        get(model, second)


def test_a_plain_function_as_activation_is_named_and_isolated() -> None:
    model = tiny_model("bert")
    for layer in model.bert.encoder.layer:
        del layer.intermediate.intermediate_act_fn
        layer.intermediate.intermediate_act_fn = nn.functional.silu  # as a config whose hidden_act is a function
    want, sites = tiny_output(model), find_sites(model)
    assert {site.activation for site in sites} == {"silu"}
    for site in sites:
        isolate(model, site)
    assert torch.equal(tiny_output(model), want)


@pytest.mark.parametrize("name", ["relu6", "gelu_10", "relu2", "gelu_fast", "quick_gelu", "tanh"])
def test_the_activation_is_named_from_the_module_when_the_config_lies(name: str) -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = ACT2FN[name]
    grid = torch.linspace(-12, 12, 97)
    assert torch.equal(find_sites(model)[0].act()(grid), ACT2FN[name](grid))


@pytest.mark.parametrize("act, why", [(nn.PReLU(), "trainable parameters"), (torch.sin, "equals no parameter-free")])
def test_an_activation_without_a_name_is_refused(act: object, why: str) -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        del layer.mlp.act_fn
        layer.mlp.act_fn = act
    with pytest.raises(FactorMixError, match=f"model.layers.0.mlp.act_fn cannot be named: .*{why}.*Allowed: silu"):
        find_sites(model)


def test_an_unknown_family_is_told_what_was_looked_for_and_how_to_add_it() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    model.config.model_type = "lama"
    with pytest.raises(FactorMixError) as caught:
        find_sites(model)
    message = str(caught.value)
    assert "model_type 'lama' (LlamaForCausalLM)" in message
    assert "Looked for: an entry 'lama' in the table FAMILIES" in message
    assert "model.layers.*.mlp.up_proj (32 -> 64) with model.layers.*.mlp.down_proj (64 -> 32)" in message
    assert "Known families: albert, bert" in message and "Did you mean 'llama'?" in message
    assert "FAMILIES['lama'] = Family((FFNPaths(" in message


def test_a_family_without_ffn_pairs_says_so() -> None:
    config = MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(FactorMixError, match="model_type 'mamba'.*Linear pairs .* seen: "):
        find_sites(MambaForCausalLM(config))


def test_a_family_can_be_added_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    model.config.model_type = "mine"
    entry = FFNPaths(at="layers.*.mlp", gate="gate_proj", up="up_proj", down="down_proj", act="act_fn")
    monkeypatch.setitem(FAMILIES, "mine", Family((entry,)))
    assert len(find_sites(model)) == 2


def test_an_entry_that_finds_nothing_names_the_modules_it_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "llama", FAMILIES["gpt2"])
    with pytest.raises(FactorMixError, match=r"modules named '...h.\*.mlp' with c_fc, act, c_proj"):
        find_sites(tiny_model("llama"))


def test_an_entry_with_the_wrong_parts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    swapped = FFNPaths(at="layers.*.mlp", gate="gate_proj", up="down_proj", down="up_proj", act="act_fn")
    monkeypatch.setitem(FAMILIES, "llama", Family((swapped,)))
    with pytest.raises(FactorMixError, match="the entry in FAMILIES does not describe this model"):
        find_sites(tiny_model("llama"))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_find_sites_refuses_a_model_after_a_swap(family: str) -> None:
    model = tiny_model(family)
    swap(model, find_sites(model)[0], nn.Linear(HIDDEN, HIDDEN))
    with pytest.raises(FactorMixError, match="lacks the dense FFN's parts"):
        find_sites(model)


def test_a_packed_weight_is_refused() -> None:
    model = tiny_model("llama")
    packed = nn.Parameter(torch.zeros(INNER * HIDDEN // 2, 1, dtype=torch.uint8), requires_grad=False)
    model.model.layers[0].mlp.up_proj.weight = packed
    with pytest.raises(FactorMixError, match="model.layers.0.mlp.up_proj is Linear with a torch.uint8 weight"):
        find_sites(model)


def test_t5_in_half_precision_keeps_its_float32_down_projection() -> None:
    model = tiny_model("t5-gated").bfloat16()
    site = find_sites(model)[0]
    ffn = get(model, site)
    ffn.wo.float()
    x = torch.randn(4, HIDDEN, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(weights(model, site).forward(x, site.act()), ffn(x))
