"""Every family reaches a stock container that computes the same, and comes back from it; what cannot is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import factormix
from factormix.export import CONTAINERS
from factormix.export.choose import choose_container
from factormix.export.needs import read_needs
from factormix.export.router_scale import M
from factormix.nn import SparseFFN
from factormix.run.errors import FactorMixError
from tests.export.tiny import difference, exported, factored, logits, typical, windows

HOLDS = [  # family, layout, gate, container that `auto` takes
    ("llama", "S1A2E4", "hard", "granite"),
    ("llama", "S0A2E4", "paper", "granite"),
    ("mistral", "S0A2E4", "hard", "mixtral"),
    ("qwen2", "S1A2E4", "hard", "qwen2_moe"),
    ("qwen2", "S0A2E4", "hard", "qwen2_moe"),
    ("qwen2", "S1A2E4", "soft", "glm4_moe"),
    ("qwen3", "S1A2E4", "hard", "glm4_moe"),
    ("qwen3", "S0A2E4", "paper", "qwen3_moe"),
    ("olmo2", "S0A2E4", "hard", "flex_olmo"),
    ("granite-plain", "S1A2E4", "hard", "granite"),
]


def model_of(family: str, layout: str, gate: str) -> transformers.PreTrainedModel:
    if family == "granite-plain":
        multipliers = {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 4.0}
        return factored("granite", layout, gate, mlp_bias=False, attention_multiplier=0.3, **multipliers)
    return factored(family, layout, gate)


@pytest.mark.parametrize(("family", "layout", "gate", "container"), HOLDS)
def test_a_family_reaches_its_container_and_comes_back(
    family: str, layout: str, gate: str, container: str, tmp_path: Path
) -> None:
    model = model_of(family, layout, gate)
    result = exported(model, tmp_path / "out")  # refuses by itself where parity is outside its limits
    assert result.choice.container.name == container and container in result.choice.reason
    assert (result.router_scale.m is None) == (gate == "soft")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(stock) is CONTAINERS[container].model_class
    assert typical(logits(stock), logits(model)) < 1e-3
    back = factormix.load(tmp_path / "out")
    assert type(back) is type(model) and back.config.factormix == model.config.factormix
    assert difference(logits(back), logits(model)) < 1e-5


@pytest.mark.parametrize(
    ("family", "layout", "to", "says"),
    [
        ("llama", "S1A2E4", "mixtral", "no shared neurons.*S0A3E4.*Containers that hold it: granite"),
        ("llama-bias", "S1A2E4", "auto", "no biases in its experts.*--approximate"),
        ("qwen3", "S1A2E4", "qwen3_moe", "no shared neurons.*S0A3E4.*glm4_moe"),
        ("qwen3", "S0A2E4", "glm4_moe", "must have shared neurons.*S1A1E4"),
        ("olmo2", "S1A2E4", "auto", "flex_olmo.*no shared neurons.*S0A3E4.*--approximate"),
        ("qwen2", "S1A2E4", "granite", "no place for these attention biases.*qwen2_moe"),
        ("qwen3", "S0A2E4", "mixtral", "query and key norms 'none'"),
        ("olmo2", "S0A2E4", "granite", "norms before"),
        ("gemma", "S1A2E4", "auto", "no stock container.*'gemma'.*factormix.load"),
        ("gpt2", "S1A2E4", "auto", "no stock container.*'gpt2'"),
        ("llama-classify", "S1A2E4", "auto", "does not predict next tokens"),
        ("llama", "S1A2E4", "granit", "Did you mean 'granite'"),
    ],
)
def test_what_no_container_holds_is_refused_with_a_remedy(family: str, layout: str, to: str, says: str) -> None:
    with pytest.raises(FactorMixError, match=f"(?s){says}"):
        choose_container(read_needs(factored(family, layout)), to)


def test_a_dense_layer_among_sparse_ones_is_refused() -> None:
    model = factored("llama")
    model.config.factormix["sites"].pop("1")
    model.model.layers[1].mlp = torch.nn.Identity()
    with pytest.raises(FactorMixError, match="1 of 2 FFNs are dense"):
        read_needs(model)


def test_static_pruning_is_refused() -> None:
    model = factored("llama")
    ffn = model.sparse_ffns()[0]
    ffn.spec = replace(ffn.spec, active=0)
    with pytest.raises(FactorMixError, match="S1A0E4 routes nothing.*S0A1E4"):
        read_needs(model)


def test_a_layer_that_runs_whole_is_refused() -> None:
    model = factored("llama")
    ffn = model.sparse_ffns()[0]
    ffn.spec = replace(ffn.spec, shared=4, active=0)
    with pytest.raises(FactorMixError, match="1 of 2 FFNs run whole.*--allocation uniform"):
        read_needs(model)


def test_layers_that_differ_are_refused() -> None:
    needs = read_needs(factored("llama"))
    first = needs.specs[0]
    with pytest.raises(FactorMixError, match=r"active experts, not \[1, 2\].*every layer runs 2 experts"):
        choose_container(replace(needs, specs=(first, replace(first, active=1))), "granite")
    with pytest.raises(FactorMixError, match=r"one number of experts for all layers, not \[3, 7\]"):
        choose_container(replace(needs, specs=(first, replace(first, slices=8))), "granite", approximate=True)


@pytest.mark.parametrize(
    ("family", "layout", "gate", "to", "distance", "says"),
    [
        ("olmo2", "S1A2E4", "hard", "auto", 2e-3, "shared neurons go into each of the 3 experts"),  # exact, only larger
        ("llama", "S1A2E4", "paper", "mixtral", 2e-3, "computed 2 times"),
        ("llama-bias", "S1A2E4", "hard", "auto", 0.9, "biases are left out"),
        ("llama", "S1A2E4", "soft", "granite", 0.9, "mean weight"),
    ],
)
def test_approximations_say_what_they_do_and_how_far_it_is(
    family: str, layout: str, gate: str, to: str, distance: float, says: str, tmp_path: Path
) -> None:
    model = factored(family, layout, gate)
    result = exported(model, tmp_path / "out", to=to, approximate=True)
    assert says in result.choice.approximations[0]
    assert says in (tmp_path / "out/README.md").read_text() and result.parity.logit_error < distance
    if result.choice.needs.copy_shared:
        assert difference(logits(factormix.load(tmp_path / "out")), logits(model)) < 1e-5
    else:
        assert result.parity.logit_error > 2e-3  # the distance is measured, not assumed
        with pytest.raises(FactorMixError, match="not the model it was made from"):
            factormix.load(tmp_path / "out")


def test_an_exact_container_is_preferred_to_an_approximation() -> None:
    assert choose_container(read_needs(factored("llama")), approximate=True).approximations == ()


def test_narrower_parts_are_padded_with_zero_neurons(tmp_path: Path) -> None:
    """As after adapters were merged: one layer has more shared neurons than the others."""
    model = factored("llama")
    old = model.sparse_ffns()[0]
    ffn = SparseFFN(replace(old.spec, shared=old.spec.shared + 1, slices=old.spec.slices + 1)).eval()
    with torch.no_grad():
        for parameter in ffn.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape))
    model.model.layers[0].mlp = ffn
    model.config.factormix["sites"]["0"] = ffn.spec.to_dict()
    exported(model, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.shared_intermediate_size == 32
    assert difference(logits(factormix.load(tmp_path / "out")), logits(model)) < 1e-5


def test_a_model_outside_the_limits_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    granite = type(CONTAINERS["granite"])
    tensors = granite.tensors
    wrong = lambda self, block: tensors(self, replace(block, down=1.01 * block.down))  # noqa: E731
    monkeypatch.setattr(granite, "tensors", wrong)
    with pytest.raises(FactorMixError, match="nothing was written.*logits, experts forced"):
        exported(factored("llama"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_too_little_text_and_float16_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FactorMixError, match="640 tokens of text are too few"):
        exported(factored("llama"), tmp_path / "out", packed=windows(10))
    with pytest.raises(FactorMixError, match=r"float16.*float32, bfloat16"):
        exported(factored("llama").half(), tmp_path / "out")


def test_a_bfloat16_model_keeps_its_dtype_and_float32_routers(tmp_path: Path) -> None:
    model = factored("llama")
    for parameter in model.parameters():  # not the buffers, as from_pretrained does
        parameter.data = parameter.data.bfloat16()
    exported(model, tmp_path / "out")
    stored = load_file(tmp_path / "out/model.safetensors")
    kinds = {name.endswith("router.layer.weight"): tensor.dtype for name, tensor in stored.items()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    back = factormix.load(tmp_path / "out")
    assert back.dtype == torch.bfloat16 and typical(logits(back), logits(model)) < 1e-2  # sums in another order
    assert difference(logits(factormix.load(tmp_path / "out", dtype=torch.float32)), logits(model.float())) < 1e-5


def test_plain_transformers_needs_no_factormix(tmp_path: Path) -> None:
    """Another process, where importing factormix fails."""
    model = factored("llama")
    exported(model, tmp_path / "out")
    torch.save(windows(8).input_ids, tmp_path / "ids.pt")
    script = (
        "import sys, torch; sys.modules['factormix'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r}, dtype='auto')\n"
        f"ids = torch.load({str(tmp_path / 'ids.pt')!r})\n"
        f"with torch.no_grad(): torch.save(model(input_ids=ids).logits, {str(tmp_path / 'logits.pt')!r})\n"
        f"torch.save(model.generate(ids[:2, :8], max_new_tokens=64, do_sample=False), {str(tmp_path / 'text.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, timeout=120)
    assert typical(torch.load(tmp_path / "logits.pt"), logits(model)) < 1e-3
    greedy = model.generate(windows(8).input_ids[:2, :8], max_new_tokens=64, do_sample=False)
    assert torch.equal(torch.load(tmp_path / "text.pt"), greedy)


def test_the_record_holds_m_and_parity(tmp_path: Path) -> None:
    result = exported(factored("llama"), tmp_path / "out")
    metrics = json.loads((tmp_path / "out/run.json").read_text())["metrics"]
    assert metrics["m"] == result.router_scale.m in M
    assert metrics["parity"]["logit_error"] == result.parity.logit_error > 0
    assert metrics["parity"]["tokens"] == 4096
