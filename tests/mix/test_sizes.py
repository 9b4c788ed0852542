"""Which FFNs get an adapter and how wide: the paper's depths, the budget's arithmetic, what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from factormix import FactorMixError
from factormix.ffn import FFNSite, find_sites
from factormix.mix.config import InjectConfig
from factormix.mix.sizes import Sizes, adapter_sizes, choose_sites
from factormix.mix.stage1 import learns_by, plan
from factormix.nn import sites_of
from tests.families import tiny_model
from tests.nn.sparse import sparsify


def sites(layers: int, hidden: int = 576, inner: int = 1536) -> list[FFNSite]:
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, vocab_size=100,
        num_attention_heads=9 if hidden == 576 else 4,
    )  # fmt: skip
    with torch.device("meta"):
        return find_sites(LlamaForCausalLM(config))


def sizes(total: int = 134_515_008, **options: object) -> Sizes:
    default = {"form": "ffn", "reads": "input", "layers": "auto", "width": None, "reduction": None, "budget": 0.004}
    return adapter_sizes(sites(30), total, **{**default, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("total", "layers", "want"),
    [
        (24, "auto", (7, 11)),  # the paper's
        (30, "auto", (8, 13)),
        (2, "auto", (0,)),
        (30, "spread", (6, 9, 12, 15, 18, 21, 24, 27)),
        (24, "7,11", (7, 11)),
        (24, [3], (3,)),
    ],
)
def test_depths(total: int, layers: str, want: tuple[int, ...]) -> None:
    assert tuple(site.layers[0] for site in choose_sites(sites(total), layers)) == want


def test_layers_that_share_one_ffn_name_it_and_both_stacks_of_an_encoder_decoder_count() -> None:
    albert = choose_sites(sites_of(tiny_model("albert")), "auto")
    assert [site.layers for site in albert] == [(0, 1, 2, 3, 4, 5)]
    t5 = choose_sites(sites_of(tiny_model("t5-gated")), [1])
    assert [site.stack for site in t5] == ["encoder", "decoder"]


def test_a_factored_model_has_its_dense_forms_sites() -> None:
    assert sites_of(sparsify(tiny_model("llama"))) == sites_of(tiny_model("llama"))


def test_budget_is_kept_and_the_merged_width_suits_engines() -> None:
    auto, spread = sizes(), sizes(layers="spread")
    assert (auto.width, spread.width) == (128, 32) and auto.parameters == spread.parameters == 442_368
    assert auto.parameters <= 0.004 * 134_515_008 and (1536 + auto.width) % 32 == 0
    assert sizes(budget=0.008).width == 256  # 311 neurons fit; 1536 + 256 is a multiple of 256
    assert sizes(budget=0.0001).width == 3  # too few for either multiple: as many as fit
    neck = sizes(form="bottleneck", reads="neurons")
    assert 0.0039 < neck.parameters / 134_515_008 <= 0.004
    assert auto.flops == 2 * auto.parameters and "128" in str(auto) and "0.33 %" in str(auto)


def test_width_then_reduction_decide() -> None:
    assert sizes(width=77).width == 77 and sizes(reduction=16).width == 36


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(FactorMixError, match=r"one neuron in each of 2 adapters takes 3,456. Raise --budget"):
        sizes(budget=0.00001)
    with pytest.raises(FactorMixError, match=r"\[30\] not allowed; this model has 0 to 29"):
        sizes(layers="3,30")
    with pytest.raises(FactorMixError, match="'middle' is not understood"):
        sizes(layers="middle")
    with pytest.raises(FactorMixError, match="give one of them"):
        InjectConfig(width=8, reduction=4)
    with pytest.raises(FactorMixError, match="trains nothing"):
        InjectConfig(knowledge_weight=0)
    with pytest.raises(FactorMixError, match="goes with form 'bottleneck'"):
        InjectConfig(reads="neurons")


def test_what_a_model_learns_by() -> None:
    assert learns_by(tiny_model("llama")) == learns_by(sparsify(tiny_model("llama"))) == "causal"
    assert learns_by(tiny_model("bert")) == learns_by(tiny_model("albert")) == "masked"
    for family in ("bert-base", "llama-classify", "t5-gated"):
        with pytest.raises(FactorMixError, match="neither a causal nor a masked"):
            learns_by(tiny_model(family))


def test_planning_needs_no_weights() -> None:
    with torch.device("meta"):
        model = BertForMaskedLM(BertConfig(vocab_size=100, hidden_size=384, num_hidden_layers=6, num_attention_heads=6))
    assert plan(model, InjectConfig(form="bottleneck")).specs[1].source == 3072


@pytest.mark.parametrize(("given", "layers"), [(7, "7"), ([7, 11], "7,11"), ("7, 11", "7, 11"), ("auto", "auto")])
def test_layers_as_yaml_reads_them(given: object, layers: str) -> None:
    assert InjectConfig.from_dict({"layers": given}).layers == layers
