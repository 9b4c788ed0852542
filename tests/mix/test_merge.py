"""Merging: equal logits, a checkpoint that stock transformers loads, and a reason where it would not be exact."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers

from factormix import FactorMixError, load
from factormix.mix.adapter_files import load_adapters
from factormix.mix.merge import merge_adapters
from factormix.nn import DomainFFN
from tests.families import TINY, tiny_output
from tests.mix.adapted import base_model, saved
from tests.nn.sparse import sparsify


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("family", sorted(TINY))
def test_merged_equals_unmerged_in_every_family(family: str, sparse: bool, tmp_path: Path) -> None:
    model = base_model(family, sparse)
    base = tiny_output(model)
    folder = saved(tmp_path, model)
    want = tiny_output(model)
    assert (want - base).norm() / base.norm() > 0.01
    wide = base_model(family, sparse)
    merged = merge_adapters(wide, [(folder, 1.0)])
    wide.save_pretrained(str(tmp_path / "wide"))
    stock = load(tmp_path / "wide") if sparse else TINY[family].model.from_pretrained(tmp_path / "wide")
    for each in (wide, stock):
        assert (tiny_output(each) - want).norm() / want.norm() < 1e-5
    assert merged.neurons == 8 * sum(isinstance(m, DomainFFN) for m in model.modules())
    assert merged.parameters == wide.num_parameters() - base_model(family, sparse).num_parameters()
    assert merged.bytes == 4 * merged.parameters


def test_weights_and_several_adapters(tmp_path: Path) -> None:
    one = saved(tmp_path, base_model("llama"), "one-1", seed=1)
    two = saved(tmp_path, base_model("llama"), "two-2", seed=2, layers=[1])
    model = base_model("llama")
    load_adapters(model, {"one-1": one, "two-2": two})
    for layer in model.modules():
        if isinstance(layer, DomainFFN):
            layer.fixed_weights["one-1"] = 0.25 if "one-1" in layer.fixed_weights else 1.0
    want = tiny_output(model)
    wide = base_model("llama")
    merge_adapters(wide, [(one, 0.25), (two, 1.0)])
    assert (tiny_output(wide) - want).norm() / want.norm() < 1e-5


def test_the_numbers_of_a_dense_and_a_factored_model(tmp_path: Path) -> None:
    folder = saved(tmp_path, base_model("llama"))
    wide = base_model("llama")
    merged = merge_adapters(wide, [(folder, 1.0)])
    # 64 + 8 neurons become 96, a multiple of 32, in both layers: 32 each, 3 matrices of H = 32
    assert (merged.inner, merged.neurons, merged.zero_neurons) == (96, 8, 56)
    assert merged.parameters == 2 * 32 * 3 * 32 and merged.flops_per_token == 2 * merged.parameters
    assert wide.config.intermediate_size == 96 and "56 zero neurons" in str(merged)
    sparse = base_model("llama", sparse=True)  # S1A1E4, slices of 16
    merged = merge_adapters(sparse, [(folder, 1.0)])
    assert (merged.inner, merged.neurons, merged.zero_neurons) == (80, 8, 8)
    assert sparse.config.factormix["sites"]["0"]["shared"] == 2 and sparse.config.factormix["sites"]["1"]["shared"] == 1


def test_sites_of_one_and_of_two_digits(tmp_path: Path) -> None:
    """JSON sorts "11" before "2"; once that alone made the merge refuse the adapter's own model."""
    config = transformers.LlamaConfig(**{**TINY["llama"].options, "num_hidden_layers": 12})
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    wide = copy.deepcopy(model)
    folder = saved(tmp_path, model, layers=[2, 11])
    merge_adapters(wide, [(folder, 1.0)])
    assert (tiny_output(wide) - tiny_output(model)).norm() / tiny_output(model).norm() < 1e-5


def test_the_checkpoint_is_an_ordinary_one(tmp_path: Path) -> None:
    wide = base_model("qwen2")
    merge_adapters(wide, [(saved(tmp_path, base_model("qwen2")), 1.0)])
    wide.save_pretrained(tmp_path / "wide")
    text = (tmp_path / "wide" / "config.json").read_text()
    assert "factormix" not in text.lower() and "mixda" not in text.lower()
    assert type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "wide")) is transformers.Qwen2ForCausalLM


def test_a_bottleneck_on_an_ffn_of_its_own_kind_merges(tmp_path: Path) -> None:
    model = base_model("bert")  # plain, GELU, with both biases: so is a bottleneck that reads the input
    folder = saved(tmp_path, model, form="bottleneck-input")
    want, wide = tiny_output(model), base_model("bert")
    merge_adapters(wide, [(folder, 0.5), (folder, 0.5)])
    assert (tiny_output(wide) - want).norm() / want.norm() < 1e-5


@pytest.mark.parametrize(
    ("family", "form", "why"),
    [
        ("llama", "bottleneck-neurons", "it reads the FFN's neurons"),
        ("llama", "bottleneck-input", "its neurons are plain gelu, but the FFN's are gated silu"),
        ("modernbert", "bottleneck-input", "its neurons are plain gelu, but the FFN's are gated gelu"),
        ("t5-encoder", "bottleneck-input", "its neurons are plain gelu, but the FFN's are plain relu"),
    ],
)
def test_what_does_not_merge_exactly_is_refused_with_the_reason(
    family: str, form: str, why: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path, base_model(family), form=form)
    with pytest.raises(FactorMixError, match=f"does not merge exactly: {why}"):
        merge_adapters(base_model(family), [(folder, 1.0)])
    with pytest.raises(FactorMixError, match="does not merge exactly"):
        merge_adapters(base_model(family, sparse=True), [(folder, 1.0)])


def test_the_papers_gate_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, base_model("llama"))
    with pytest.raises(FactorMixError, match="multiplies every expert by E / K"):
        merge_adapters(sparsify(base_model("llama"), "S0A2E4", output_weight="paper"), [(folder, 1.0)])


def test_another_model_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, base_model("bert"))
    with pytest.raises(FactorMixError, match="made for another model"):
        merge_adapters(base_model("llama"), [(folder, 1.0)])


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_another_base_of_equal_shapes_is_refused(family: str, sparse: bool, tmp_path: Path) -> None:
    folder = saved(tmp_path, base_model(family, sparse))
    other = base_model(family, sparse)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    with pytest.raises(FactorMixError, match="on another base of the same shapes"):
        merge_adapters(other, [(folder, 1.0)])


def test_a_config_without_one_width_is_refused_and_left_alone(tmp_path: Path) -> None:
    folder = saved(tmp_path, base_model("llama"))
    model = base_model("llama")
    model.config.intermediate_size = 63  # says another width than the FFNs have
    with pytest.raises(FactorMixError, match="no single field for the FFNs' width 64"):
        merge_adapters(model, [(folder, 1.0)])
    assert model.config.intermediate_size == 63 and torch.equal(tiny_output(model), tiny_output(base_model("llama")))
