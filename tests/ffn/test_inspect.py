"""What the FFNs cost: counts against the real model's own, a hand computation, and Amdahl's law."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, MambaConfig
from transformers.pytorch_utils import Conv1D

from factormix.ffn import cost, find_sites
from factormix.ffn.cost import inspect_model
from factormix.run.errors import FactorMixError
from tests.families import TINY, tiny_config, tiny_inputs, tiny_model


@pytest.mark.parametrize("family", TINY)
def test_parameters_add_up_to_the_models_own(family: str) -> None:
    model, report = tiny_model(family), inspect_model(tiny_config(family))
    assert report.model_class == type(model).__name__
    assert report.parameters == model.num_parameters()
    assert report.parameters == report.ffn_parameters + report.embedding_parameters + report.other_parameters
    assert report.ffn_parameters == sum(group.sites * group.parameters for group in report.groups)
    assert min(report.embedding_parameters, report.other_parameters) > 0
    assert all(0 < share < 1 for share in (report.parameter_share, report.flops_share, report.read_share))
    assert inspect_model(model) == report


@pytest.mark.parametrize("family", [family for family in TINY if family not in ("gemma3", "deberta-v2")])
def test_flops_are_those_of_the_matrix_products_that_run(family: str) -> None:
    """Counted with hooks in a real forward pass. Left out: images; DeBERTa projects positions besides."""
    model = tiny_model(family)
    weights_crossed = 0

    def count(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal weights_crossed
        weights_crossed += module.weight.numel()  # once a call, whatever the number of tokens

    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(**tiny_inputs(model))
    assert inspect_model(tiny_config(family)).flops_per_token == 2 * weights_crossed


@pytest.mark.parametrize("tied", [False, True])
def test_llama_by_hand(tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        architectures=["LlamaForCausalLM"],
    )
    ffn = 3 * 3 * 16 * 40  # layers x matrices x H x I
    attention = 3 * (16 * 16 + 2 * 16 * 8 + 16 * 16)  # query, key and value of half the width, output
    norms = (2 * 3 + 1) * 16
    table = head = 100 * 16
    report = inspect_model(config)
    assert report.ffn_parameters == ffn
    assert report.parameters == ffn + attention + norms + table + (0 if tied else head)
    assert report.flops_per_token == 2 * (ffn + attention + head)
    assert report.parameter_share == pytest.approx(ffn / report.parameters)
    assert report.flops_share == pytest.approx(ffn / (ffn + attention + head))
    assert report.read_share == pytest.approx(ffn / (ffn + attention + head + norms))
    limit = report.speed_limit(0.25)
    assert limit.prefill == pytest.approx((ffn + attention + head) / (ffn / 4 + attention + head))
    assert limit.decode == pytest.approx((ffn + attention + head + norms) / (ffn / 4 + attention + head + norms))
    (group,) = report.groups
    assert (group.stack, group.layers, group.sites, group.hidden, group.inner) == ("decoder", (0, 1, 2), 3, 16, 40)


def test_a_shared_ffn_counts_each_time_it_runs_but_is_stored_once() -> None:
    (group,) = inspect_model(tiny_config("albert")).groups
    assert (group.sites, group.use_count, group.layers) == (1, 6, (0, 1, 2, 3, 4, 5))
    report = inspect_model(tiny_config("albert"))
    assert report.ffn_flops_per_token == 2 * 6 * 2 * 32 * 64
    assert report.ffn_parameters == group.parameters == 2 * 32 * 64 + 64 + 32
    assert report.ffn_read_parameters == 6 * group.parameters


def test_an_encoder_decoder_has_a_row_for_each_stack() -> None:
    report = inspect_model(tiny_config("t5-gated"))
    assert [(group.stack, group.layers) for group in report.groups] == [("encoder", (0, 1)), ("decoder", (0, 1))]


def test_an_image_tower_is_not_crossed_by_text() -> None:
    whole, text = inspect_model(tiny_config("gemma3")), inspect_model(tiny_config("gemma3_text"))
    assert whole.parameters > text.parameters
    assert (whole.flops_per_token, whole.read_parameters) == (text.flops_per_token, text.read_parameters)


def test_speed_limit_is_one_when_all_runs_and_refuses_nonsense() -> None:
    report = inspect_model(tiny_config("llama"))
    assert report.speed_limit(1.0).to_dict() == {"active_fraction": 1.0, "prefill": 1.0, "decode": 1.0}
    assert report.speed_limit(0.25).prefill > report.speed_limit(0.5).prefill > 1.0
    for wrong in (-0.1, 1.5, 50):
        with pytest.raises(FactorMixError, match=f"active_fraction {wrong}.*0 to 1"):
            report.speed_limit(wrong)


def test_only_the_config_of_a_directory_is_read_and_the_report_is_json(tmp_path: Path) -> None:
    config = tiny_config("bert-classify")
    config.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    report = inspect_model(tmp_path)
    assert report.model_class == "BertForSequenceClassification"
    written = json.loads(json.dumps(report.to_dict()))
    assert written["flops_share"] == report.flops_share and written["groups"][0]["inner"] == 64


def test_a_config_is_built_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(cost, "find_sites", lambda model: seen.append(model) or find_sites(model))
    inspect_model(tiny_config("gpt2"))
    assert all(parameter.is_meta for parameter in seen[0].parameters())


def test_a_config_without_architectures_is_built_as_the_base_model() -> None:
    config = tiny_config("llama")
    config.architectures = None
    assert inspect_model(config).model_class == "LlamaModel"


def test_what_cannot_be_inspected_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FactorMixError, match="no model config at"):
        inspect_model(tmp_path)
    with pytest.raises(FactorMixError, match="model_type 'mamba'"):
        inspect_model(MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, state_size=4))
