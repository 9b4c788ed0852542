"""One gated domain as a Qwen2-MoE: equal logits, stock classes alone, and a reason where it would not be exact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from factormix import FactorMixError
from factormix.mix.gate_files import save_gates
from factormix.mix.mix_model import MixModel
from factormix.mix.qwen2_moe import to_qwen2_moe
from factormix.mix.task_adapters import TaskAdapterSpec
from tests.families import TINY, tiny_output
from tests.mix.adapted import base_model, saved
from tests.mix.toy import disturb


def gated(folder: Path, model: PreTrainedModel, layers: list[int] | None = None, **gate: str) -> tuple[Path, Path]:
    """A random adapter of the model and random gates over it, which stand in the model afterwards."""
    adapter = saved(folder, type(model)(model.config), layers=layers or [1])
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_ffns": None}))  # shapes decide here
    mix = MixModel(model, {"pubmed": adapter}, TaskAdapterSpec("none"), 0, **gate)
    disturb(mix)
    (folder / "gate").mkdir()
    save_gates(mix.gates, {"pubmed": adapter}, folder / "gate")
    return adapter, folder / "gate"


def variant(family: str, **options: object) -> PreTrainedModel:
    torch.manual_seed(0)
    tiny = TINY[family]
    return tiny.model(tiny.config(**{**tiny.options, **options})).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"head_dim": 16}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "rms_norm_eps": 1e-2}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
    ],
    ids=["llama", "tied", "head-dim", "rope", "mistral", "qwen2"],
)
@pytest.mark.parametrize("layers", [[1], [0, 1]], ids=["one", "all"])
def test_equal_logits_from_a_plain_checkpoint(
    family: str, options: dict[str, object], layers: list[int], tmp_path: Path
) -> None:
    base = variant(family, **options)
    twin = variant(family, **options)
    adapter, gate = gated(tmp_path, twin, layers)
    want = tiny_output(twin)
    assert (want - tiny_output(base)).norm() / want.norm() > 0.01
    made, merged = to_qwen2_moe(base, {"pubmed": adapter}, gate)
    made.save_pretrained(tmp_path / "moe")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert type(stock) is transformers.Qwen2MoeForCausalLM
    for each in (made, stock):
        assert (tiny_output(each) - want).norm() / want.norm() < 1e-5
    text = (tmp_path / "moe" / "config.json").read_text()
    assert "factormix" not in text.lower() and "mixda" not in text.lower()
    assert (stock.lm_head.weight is stock.model.embed_tokens.weight) == bool(base.config.tie_word_embeddings)
    added = len(layers) * (3 * 8 * 32 + 2 * 32)  # an adapter of 8 neurons, its gate, and a router that chooses nothing
    assert merged.parameters == stock.num_parameters() - base.num_parameters() == added
    assert (merged.neurons, merged.zero_neurons) == (8 * len(layers), 0)


@pytest.mark.parametrize(
    ("family", "options", "why"),
    [
        ("gpt2", {}, "its layers are those of another family; allowed: LlamaForCausalLM"),
        ("qwen3", {}, "its layers are those of another family"),
        ("llama", {"attention_bias": True}, "output bias"),
        ("llama-bias", {}, "FFNs have biases"),
        ("mistral", {"sliding_window": 4}, "sliding window"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4}, "sliding window"),
    ],
)
def test_another_base_is_refused_with_the_reason(
    family: str, options: dict[str, object], why: str, tmp_path: Path
) -> None:
    adapter, gate = gated(tmp_path, variant(family, **options))
    with pytest.raises(FactorMixError, match=f"is no Qwen2-MoE model with gated domains: .*{why}"):
        to_qwen2_moe(variant(family, **options), {"pubmed": adapter}, gate)


def test_other_gates_adapters_and_counts_are_refused(tmp_path: Path) -> None:
    for number, options in enumerate(({"gate": "softmax"}, {"gate": "paper"}, {"start": "off"})):
        (tmp_path / str(number)).mkdir()
        adapter, gate = gated(tmp_path / str(number), variant("llama"), **options)
        with pytest.raises(FactorMixError, match=r"Allowed: 'sigmoid' that started 'on'"):
            to_qwen2_moe(variant("llama"), {"pubmed": adapter}, gate)
    adapter, gate = gated(tmp_path, variant("llama"))
    with pytest.raises(FactorMixError, match="one domain; received pubmed, reviews"):
        to_qwen2_moe(variant("llama"), {"pubmed": adapter, "reviews": adapter}, gate)
    with pytest.raises(FactorMixError, match="weighs the domains pubmed, in this order; received reviews"):
        to_qwen2_moe(variant("llama"), {"reviews": adapter}, gate)
    with pytest.raises(FactorMixError, match="sparse already"):
        to_qwen2_moe(base_model("llama", sparse=True), {"pubmed": adapter}, gate)
    bottleneck = saved(tmp_path / "b", variant("llama"), form="bottleneck-input", layers=[1])
    other = json.loads((gate / "gate.json").read_text())
    from factormix.run.directory import sha256

    other["domains"][0]["sha256"] = sha256(bottleneck / "adapter_model.safetensors")
    (gate / "gate.json").write_text(json.dumps(other))
    with pytest.raises(FactorMixError, match="does not merge exactly: its neurons are plain gelu"):
        to_qwen2_moe(variant("llama"), {"pubmed": bottleneck}, gate)
