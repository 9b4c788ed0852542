"""PEFT's container, one suite for every form and kind of FFN: fresh == base, save and load, disable, freeze."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import factormix.mix
from factormix import FactorMixError
from factormix.mix.adapter_files import load_adapters, save_adapter
from factormix.mix.peft_enum import mixda_type
from factormix.mix.peft_tuner import MixDAConfig, adapter_names, assert_trainable, trainable_names
from factormix.nn import DomainFFN, DomainGate
from tests.families import TINY, tiny_output
from tests.mix.adapted import FORMS, adapted, base_model, randomise, saved

KINDS = [("llama", False), ("llama", True), ("gpt2", False), ("phi3", False), ("bert", False), ("opt", True),
         ("albert", False), ("albert", True), ("modernbert", False), ("t5-gated", False)]  # fmt: skip
EVERY = pytest.mark.parametrize(("family", "sparse"), KINDS, ids=[f"{f}-{'sparse' * s or 'dense'}" for f, s in KINDS])
FORM = pytest.mark.parametrize("form", FORMS)


def test_the_enum_member_is_like_the_others() -> None:
    assert mixda_type() is mixda_type() is PeftType.MIXDA is PeftType("MIXDA") is PeftType["MIXDA"]  # type: ignore[attr-defined]
    assert mixda_type() == "MIXDA" and mixda_type() in list(PeftType) and len({*PeftType}) == len(list(PeftType))


@EVERY
@FORM
def test_fresh_is_the_base_and_disabled_is_the_base_bit_for_bit(family: str, sparse: bool, form: str) -> None:
    model = base_model(family, sparse)
    want = tiny_output(model)
    wrapped = get_peft_model(model, MixDAConfig(**FORMS[form], layers=[0], width=8), adapter_name="pubmed")
    assert torch.equal(tiny_output(model), want)
    randomise(wrapped, "pubmed")
    assert (tiny_output(model) - want).abs().max() > 1e-4
    with wrapped.disable_adapter():
        assert torch.equal(tiny_output(model), want)
    assert not torch.equal(tiny_output(model), want)


@EVERY
@FORM
def test_saved_weights_load_whole_under_any_name(family: str, sparse: bool, form: str, tmp_path: Path) -> None:
    """Defect 2 of the released code: stage 1 saved under one name and looked under another, and nothing said so."""
    model = base_model(family, sparse)
    folder = saved(tmp_path, model, form=form)
    want = tiny_output(model)
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    for name in ("pubmed", "other-name"):
        again = base_model(family, sparse)
        PeftModel.from_pretrained(again, str(folder), adapter_name=name)
        assert torch.equal(tiny_output(again), want)
    third = base_model(family, sparse)
    load_adapters(third, {"biomedical": folder})
    assert torch.equal(tiny_output(third), want)


def test_pefts_own_save_loads_too(tmp_path: Path) -> None:
    model = base_model("llama")
    wrapped = adapted(model, "default")
    wrapped.save_pretrained(str(tmp_path))
    assert PeftConfig.from_pretrained(str(tmp_path)).peft_type == "MIXDA"
    again = base_model("llama")
    PeftModel.from_pretrained(again, str(tmp_path))
    assert torch.equal(tiny_output(again), tiny_output(model))


def test_adapters_at_every_layer_of_a_deep_model(tmp_path: Path) -> None:
    """PEFT condenses a list of 20 target modules or more to endings that they share."""
    deep = LlamaConfig(**{**TINY["llama"].options, "num_hidden_layers": 24})
    base, again = LlamaForCausalLM(deep).eval(), LlamaForCausalLM(deep).eval()
    again.load_state_dict(base.state_dict())
    wrapped = get_peft_model(base, MixDAConfig(layers=list(range(24)), width=8), adapter_name="pubmed")
    randomise(wrapped, "pubmed")
    save_adapter(wrapped, "pubmed", tmp_path / "deep", "")
    assert len(json.loads((tmp_path / "deep" / "adapter_config.json").read_text())["target_modules"]) == 24
    load_adapters(again, {"pubmed": tmp_path / "deep"})
    assert torch.equal(tiny_output(again), tiny_output(base))


def test_tensors_that_do_not_fit_are_refused_not_skipped(tmp_path: Path) -> None:
    """Defect 2 once more: a tensor under a wrong name leaves a fresh adapter, which looks like a base that learnt
    nothing."""
    folder = saved(tmp_path, base_model("llama"))
    file = folder / "adapter_model.safetensors"
    tensors = {name.replace("layers.0", "0-layers"): t for name, t in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(FactorMixError, match=r"missing .*layers.0.mlp.*in_proj.* unexpected .*0-layers"):
        load_adapters(base_model("llama"), {"pubmed": folder})


def test_the_width_is_the_saved_one_whatever_the_defaults(tmp_path: Path) -> None:
    """Defect 4 of the released code: stage 2 rebuilt the adapters with another width than stage 1."""
    folder = saved(tmp_path, base_model("llama"), width=13)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["width"] == 13 and config["sites"]["0"]["width"] == 13 and config["layers"] == [0]
    again = base_model("llama")
    load_adapters(again, {"pubmed": folder})
    (layer,) = [m for m in again.modules() if isinstance(m, DomainFFN)]
    assert layer.mixda_adapters["pubmed"].in_proj.shape == (26, 32)


@pytest.mark.parametrize(("made_on", "loaded_on"), [("llama", "phi"), ("llama", "gemma"), ("bert", "llama")])
def test_an_adapter_of_another_model_is_refused(made_on: str, loaded_on: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, base_model(made_on))
    with pytest.raises(FactorMixError, match="made for another model"):
        load_adapters(base_model(loaded_on), {"pubmed": folder})


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("family", ["llama", "bert", "phi3", "gpt2", "albert", "t5-gated"])
def test_another_base_of_equal_shapes_is_refused_naming_both(family: str, sparse: bool, tmp_path: Path) -> None:
    folder = saved(tmp_path, base_model(family, sparse))
    recorded = json.loads((folder / "adapter_config.json").read_text())["base_ffns"]
    load_adapters(base_model(family, sparse).to(torch.bfloat16), {"pubmed": folder})  # the same weights, rounded
    load_adapters(base_model(family, sparse).to(torch.float16), {"pubmed": folder})  # cannot be compared
    load_adapters(base_model(family, not sparse), {"pubmed": folder})  # other weights by nature
    ours, theirs = base_model(family, sparse), base_model(family, sparse)
    with torch.no_grad():
        for parameter in (*ours.parameters(), *theirs.parameters()):
            parameter.mul_(1.01)
    with pytest.raises(FactorMixError, match=rf"on another base of the same shapes.* hash {recorded[:6]}.*{recorded}"):
        load_adapters(ours, {"pubmed": folder})
    PeftModel.from_pretrained(theirs, str(folder), adapter_name="pubmed")  # PEFT's own way asks nothing


def test_a_base_that_differs_elsewhere_is_the_same_base(tmp_path: Path) -> None:
    folder = saved(tmp_path, base_model("llama"))  # beside the FFN of layer 0
    other = base_model("llama")
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
        other.model.layers[1].mlp.up_proj.weight.mul_(2)
    load_adapters(other, {"pubmed": folder})


def test_named_adapters_switch_and_add_up(tmp_path: Path) -> None:
    names, model = ("pubmed", "reviews"), base_model("llama")
    base, outputs = tiny_output(model), {}
    for seed, name in enumerate(names):
        alone = base_model("llama")
        save_adapter(adapted(alone, name, seed=seed), name, tmp_path / name)
        outputs[name] = tiny_output(alone)
    wrapped = load_adapters(model, {name: tmp_path / name for name in names})
    both = tiny_output(model)
    for name in names:
        wrapped.set_adapter(name)
        assert torch.equal(tiny_output(model), outputs[name])
        assert (both - outputs[name]).abs().max() > 1e-4
    with wrapped.disable_adapter():
        assert torch.equal(tiny_output(model), base)
    wrapped.delete_adapter("reviews")
    wrapped.set_adapter("pubmed")
    assert torch.equal(tiny_output(model), outputs["pubmed"])
    assert torch.equal(tiny_output(wrapped.unload()), base)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_frozen_stays_frozen(sparse: bool, tmp_path: Path) -> None:
    """PEFT unfreezes what set_adapter names and what disable_adapter leaves active (peft issues 3447, 3580)."""
    folder = saved(tmp_path, base_model("llama", sparse))
    model = base_model("llama", sparse)
    wrapped = load_adapters(model, {"pubmed": folder})
    wrapped.add_adapter("reviews", MixDAConfig(layers=[1], width=8))
    wrapped.set_requires_grad("reviews", True)
    mine = adapter_names(wrapped, "reviews")
    assert mine and len(mine) == 2

    def check(when: str) -> None:
        assert_trainable(wrapped, mine, when)

    check("after add_adapter")
    wrapped.set_adapter("pubmed")
    check("after set_adapter")
    wrapped.base_model.set_adapter(["pubmed", "reviews"])
    check("after set_adapter of both")
    with wrapped.disable_adapter():
        check("in disable_adapter")
    check("after disable_adapter")
    wrapped.base_model.disable_adapter_layers()
    wrapped.base_model.enable_adapter_layers()
    check("after enable")
    wrapped.load_adapter(str(folder), "again")
    check("after load_adapter")
    wrapped.generate(input_ids=torch.tensor([[1, 5, 9]]), max_new_tokens=3)
    check("after generate")
    save_adapter(wrapped, "reviews", tmp_path / "reviews")
    check("after save")
    wrapped.set_requires_grad("reviews", False)
    assert trainable_names(wrapped) == set()


def test_a_frozen_adapter_passes_gradients_and_gets_none() -> None:
    model = base_model("llama")
    wrapped = adapted(model)
    wrapped.set_requires_grad("pubmed", False)
    wrapped.add_adapter("reviews", MixDAConfig(layers=[0], width=8))
    wrapped.base_model.set_adapter(["pubmed", "reviews"])
    wrapped.set_requires_grad("reviews", True)
    model(torch.tensor([[1, 5, 9]])).logits.sum().backward()
    got = {name for name, p in wrapped.named_parameters() if p.grad is not None}
    assert got == adapter_names(wrapped, "reviews")


def test_a_bfloat16_base_keeps_its_dtype_and_the_adapter_trains_in_float32() -> None:
    model = base_model("llama").bfloat16()
    wrapped = get_peft_model(model, MixDAConfig(layers=[0], width=8), adapter_name="pubmed")
    dtypes = {p.dtype for n, p in wrapped.named_parameters() if "mixda" in n}
    assert dtypes == {torch.float32} and model.lm_head.weight.dtype == torch.bfloat16
    assert tiny_output(model).dtype == torch.bfloat16


def test_a_gate_is_no_part_of_an_adapter(tmp_path: Path) -> None:
    model = base_model("llama")
    wrapped = adapted(model)
    for layer in model.modules():
        if isinstance(layer, DomainFFN):
            layer.set_gate(DomainGate(32, ["pubmed"]))
    save_adapter(wrapped, "pubmed", tmp_path / "pubmed")
    wrapped.save_pretrained(str(tmp_path / "theirs"))
    for folder in (tmp_path / "pubmed", tmp_path / "theirs" / "pubmed"):
        names = {name.rpartition(".")[2] for name in load_file(folder / "adapter_model.safetensors")}
        assert names == {"in_proj", "out_proj"}


@pytest.mark.parametrize("name", factormix.mix.__all__)
def test_public_names_are_there_and_explained(name: str) -> None:
    assert (inspect.getdoc(getattr(factormix.mix, name)) or "").strip()
    with pytest.raises(AttributeError, match="no attribute 'blend'"):
        _ = factormix.mix.blend


def test_merging_in_place_is_refused() -> None:
    with pytest.raises(FactorMixError, match="Use `factormix merge`"):
        adapted(base_model("llama")).merge_and_unload()


def test_a_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FactorMixError, match=r"has no adapter_config.json"):
        load_adapters(base_model("llama"), {"pubmed": tmp_path})
    folder = saved(tmp_path, base_model("llama"))
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace("MIXDA", "LORA"))
    with pytest.raises(FactorMixError, match="holds a 'LORA' adapter"):
        load_adapters(base_model("llama"), {"pubmed": folder})
    config.write_text("{")
    with pytest.raises(FactorMixError, match="is damaged"):
        load_adapters(base_model("llama"), {"pubmed": folder})
    with pytest.raises(FactorMixError, match="domain 'a b' is not allowed"):
        load_adapters(base_model("llama"), {"a b": folder})
