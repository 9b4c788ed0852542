"""transformers' Auto classes load a FactorMix directory after `import factormix`, and refuse it without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

from factormix import load
from factormix.checkpoint import FactorMixConfig
from factormix.run.errors import FactorMixError
from tests.families import tiny_output
from tests.nn.sparse import twins

AUTO = {
    "llama": "AutoModelForCausalLM",
    "gpt2": "AutoModelForCausalLM",
    "opt": "AutoModelForCausalLM",
    "bert": "AutoModelForMaskedLM",
    "modernbert": "AutoModelForMaskedLM",
    "bert-classify": "AutoModelForSequenceClassification",
    "llama-classify": "AutoModelForSequenceClassification",
    "albert-groups": "AutoModelForSequenceClassification",
    "t5-gated": "AutoModelForSeq2SeqLM",
    "mt5": "AutoModelForSeq2SeqLM",
    "gemma3": "AutoModelForImageTextToText",
    "llama-base": "AutoModel",
    "bert-base": "AutoModel",
}


def saved(family: str, tmp_path: Path) -> tuple[hf.PreTrainedModel, Path]:
    _, sparse = twins(family)
    sparse.save_pretrained(tmp_path / "m")
    return sparse, tmp_path / "m"


@pytest.mark.parametrize("family, auto", AUTO.items())
def test_an_auto_class_loads_its_own(family: str, auto: str, tmp_path: Path) -> None:
    sparse, folder = saved(family, tmp_path)
    model = getattr(hf, auto).from_pretrained(folder)
    assert type(model) is type(sparse) and not model.training
    assert torch.allclose(tiny_output(model), tiny_output(sparse), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "bert", "t5-gated", "gpt2", "opt", "albert"])
def test_automodel_takes_the_body_out_of_a_model_with_a_head(family: str, tmp_path: Path) -> None:
    sparse, folder = saved(family, tmp_path)
    body = hf.AutoModel.from_pretrained(folder)
    theirs = getattr(sparse, sparse.base_model_prefix, None) or sparse
    own = dict(theirs.state_dict())
    sparse_names = [name for name in body.state_dict() if ".experts." in name or ".router." in name]
    assert sparse_names
    for name in sparse_names:
        assert torch.equal(body.state_dict()[name], own[name])


def test_a_new_head_on_a_sparse_body(tmp_path: Path) -> None:
    sparse, folder = saved("bert", tmp_path)
    for options in ({"num_labels": 5}, {"id2label": {i: str(i) for i in range(5)}}):
        model = hf.AutoModelForSequenceClassification.from_pretrained(folder, **options)
        assert type(model).__name__ == "FactorMixBertForSequenceClassification"
        assert model.config.num_labels == 5 and model.classifier.out_features == 5
        assert torch.isfinite(model.classifier.weight).all()
        router = sparse.sparse_ffns()[0].router.weight
        assert torch.equal(model.sparse_ffns()[0].router.weight, router)
    model = load(folder, auto_class="AutoModelForSequenceClassification", num_labels=3)
    assert model.classifier.out_features == 3


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", [torch.bfloat16, "bfloat16"])
def test_the_dtype_asked_for_is_used(name: str, value: object, tmp_path: Path) -> None:
    _, folder = saved("llama", tmp_path)
    for read in (load, hf.AutoModelForCausalLM.from_pretrained):
        model = read(folder, **{name: value})
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert hf.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.float32


@pytest.mark.parametrize("how", ["eager", "sdpa"])
def test_the_attention_asked_for_is_used(how: str, tmp_path: Path) -> None:
    _, folder = saved("llama", tmp_path)
    assert load(folder, attn_implementation=how).config._attn_implementation == how
    model = hf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=how)
    assert model.config._attn_implementation == how


def test_usual_arguments_of_from_pretrained(tmp_path: Path) -> None:
    sparse, folder = saved("llama", tmp_path)
    options = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": True, "low_cpu_mem_usage": True}
    model = hf.AutoModelForCausalLM.from_pretrained(str(folder), device_map={"": "cpu"}, use_cache=False, **options)
    assert not model.config.use_cache
    assert torch.allclose(tiny_output(model), tiny_output(sparse), rtol=1e-5, atol=1e-6)
    with pytest.raises(FactorMixError, match="safetensors only"):
        load(folder, use_safetensors=False)
    with pytest.raises(TypeError, match="bogus"):
        load(folder, bogus=1)


def test_the_config_of_a_directory(tmp_path: Path) -> None:
    _, folder = saved("llama", tmp_path)
    config = hf.AutoConfig.from_pretrained(folder)
    assert isinstance(config, FactorMixConfig) and config.base_config["model_type"] == "llama"
    assert list(config.factormix["sites"]) == ["0", "1"]
    with pytest.raises(FactorMixError, match="use from_pretrained"):
        hf.AutoModelForCausalLM.from_config(config)


def test_an_auto_class_without_such_a_family_refuses(tmp_path: Path) -> None:
    _, folder = saved("llama", tmp_path)
    with pytest.raises(FactorMixError, match="AutoModelForSeq2SeqLM has no 'llama' model"):
        hf.AutoModelForSeq2SeqLM.from_pretrained(folder)


def stock(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a few lines in a process that never imports factormix."""
    lines = f"import sys, transformers as hf\nfolder = {str(folder)!r}\n{code}\nassert 'factormix' not in sys.modules\n"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", lines], capture_output=True, text=True, cwd=folder.parent, env=environment, timeout=300
    )


@pytest.mark.parametrize("auto", ["AutoConfig", "AutoModel", "AutoModelForCausalLM"])
def test_stock_transformers_refuses(auto: str, tmp_path: Path) -> None:
    _, folder = saved("llama", tmp_path)
    done = stock(f"hf.{auto}.from_pretrained(folder)", folder)
    assert done.returncode != 0 and "model type `factormix`" in done.stderr


def test_a_stock_class_named_outright_refuses(tmp_path: Path) -> None:
    _, folder = saved("llama", tmp_path)
    done = stock("hf.LlamaForCausalLM.from_pretrained(folder)", folder)
    assert done.returncode != 0 and "no file named model.safetensors" in done.stderr
