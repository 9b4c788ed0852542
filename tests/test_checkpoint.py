"""A FactorMix directory is whole or refused, and the file or tensor at fault is named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from factormix import load
from factormix.checkpoint import HASHES, is_factormix, read_config, save, verify
from factormix.run.directory import sha256
from factormix.run.errors import FactorMixError
from tests.families import tiny_model, tiny_output
from tests.nn.sparse import sparsify, twins

WEIGHTS = "model.factormix.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny llama."""
    _, sparse = twins("llama-bias")
    sparse.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rehash(folder: Path) -> None:
    """Make hashes.json true again: only what is behind the hashes can refuse now."""
    names = json.loads((folder / HASHES).read_text())
    (folder / HASHES).write_text(json.dumps({name: sha256(folder / name) for name in names}))


def edit(folder: Path, change: Callable[[dict], object], name: str = "config.json") -> None:
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-3] ^= 1
    (folder / WEIGHTS).write_bytes(bytes(data))


def foreign(folder: Path) -> None:
    save_file({"x": torch.zeros(2)}, folder / "other.safetensors")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, r"model\.factormix\.safetensors' was altered or truncated"),
    "one bit": (flip_a_bit, r"model\.factormix\.safetensors' was altered or truncated"),
    "weights missing": (lambda f: (f / WEIGHTS).unlink(), r"model\.factormix\.safetensors' is missing"),
    "foreign weights": (foreign, r"other\.safetensors' is not listed in hashes\.json: a foreign weight file"),
    "config altered": (lambda f: edit(f, lambda c: c.update(x=1)), r"config\.json' was altered"),
    "config missing": (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json' is not JSON"),
    "config not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), r"config\.json' is not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), r"config\.json' holds a JSON list"),
    "hashes missing": (lambda f: (f / HASHES).unlink(), r"hashes\.json' is missing or unreadable"),
    "hashes not JSON": (lambda f: (f / HASHES).write_text("x"), r"hashes\.json' is missing or unreadable"),
    "hashes a list": (lambda f: (f / HASHES).write_text("[1]"), r"hashes\.json' is missing or unreadable"),
    "newer": (lambda f: edit(f, lambda c: c.update(format_version=2)), "format_version 2; this FactorMix reads 1"),
    "no sites": (lambda f: edit(f, lambda c: c["factormix"].pop("sites")), "lacks factormix.sites or base_config"),
    "no base": (lambda f: edit(f, lambda c: c.update(base_config={})), "lacks factormix.sites or base_config"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_and_named(damage: str, folder: Path) -> None:
    hurt, message = DAMAGES[damage]
    hurt(folder)
    with pytest.raises(FactorMixError, match=message):
        load(folder)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    rehash(folder)


ROUTER = "model.layers.1.mlp.router.weight"
TENSORS: dict[str, tuple[Callable[[dict], object], str]] = {
    "router gone": (lambda t: t.pop(ROUTER), rf"missing tensors: {ROUTER} \(1 in all\)"),
    "bias gone": (lambda t: t.pop("model.layers.0.mlp.bias"), r"missing tensors: model\.layers\.0\.mlp\.bias"),
    "attention gone": (lambda t: t.pop("model.layers.0.self_attn.q_proj.weight"), r"missing tensors: .*q_proj"),
    "one too many": (lambda t: t.update(extra=torch.zeros(1)), r"unexpected tensors: extra \(1 in all\)"),
    "another shape": (
        lambda t: t.update({ROUTER: torch.zeros(2, 32)}),
        rf"mismatched tensors: {ROUTER} \(2, 32\) for \(3, 32\)",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_are_all_accounted_for(case: str, folder: Path) -> None:
    change, message = TENSORS[case]
    change_tensors(folder, change)
    with pytest.raises(FactorMixError, match=message):
        load(folder)


def test_another_number_of_labels_is_wanted_and_not_an_accident(tmp_path: Path) -> None:
    twins("bert-classify")[1].save_pretrained(tmp_path / "x")
    with pytest.raises(FactorMixError, match=r"mismatched tensors: classifier\.bias \(2,\) for \(5,\)"):
        load(tmp_path / "x", num_labels=5)
    model = load(tmp_path / "x", num_labels=5, ignore_mismatched_sizes=True)
    assert model.classifier.out_features == 5
    change_tensors(tmp_path / "x", lambda t: t.pop("bert.encoder.layer.0.intermediate.dense.router.weight"))
    with pytest.raises(FactorMixError, match="missing tensors: .*router.weight"):
        load(tmp_path / "x", num_labels=5, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(architecture="NoSuchForCausalLM"), "architecture 'NoSuchForCausalLM', which transformers"),
        (lambda c: c.update(architecture="AdamW"), "architecture 'AdamW'"),
        (lambda c: c["base_config"].update(model_type="nosuch"), "made of a 'nosuch' model, which transformers"),
    ],
)
def test_what_this_transformers_does_not_know(change: Callable[[dict], object], message: str, folder: Path) -> None:
    edit(folder, change)
    rehash(folder)
    with pytest.raises(FactorMixError, match=rf"config\.json'.*{message}.*Upgrade transformers"):
        load(folder)


def test_a_plain_dense_directory_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(FactorMixError, match="holds a 'llama' model, not a FactorMix one.*factormix factor"):
        load(tmp_path / "dense")
    assert not is_factormix(tmp_path / "dense") and not is_factormix(tmp_path / "nowhere")


@pytest.mark.parametrize("path", ["nowhere", "./no/where", "/no/where", "a/b/c"])
def test_a_path_that_is_not_there(path: str) -> None:
    with pytest.raises(FactorMixError, match="is not a directory here"):
        load(path)


def test_an_existing_directory_is_kept_and_replaced_only_on_request(folder: Path) -> None:
    before = {p.name: sha256(p) for p in folder.iterdir()}
    (folder / "mine.txt").write_text("keep")
    _, other = twins("llama-bias", seed=1)
    with pytest.raises(FactorMixError, match="exists and is not empty.*overwrite"):
        other.save_pretrained(folder)
    assert {p.name: sha256(p) for p in folder.iterdir() if p.name != "mine.txt"} == before
    other.save_pretrained(folder, overwrite=True)
    assert not (folder / "mine.txt").exists()
    assert torch.allclose(tiny_output(load(folder)), tiny_output(other), rtol=1e-5, atol=1e-6)
    assert [p.name for p in folder.parent.iterdir()] == ["model"]  # no temporary is left


def test_a_failure_in_mid_save_leaves_the_old(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: sha256(p) for p in folder.iterdir()}
    _, other = twins("llama-bias", seed=1)
    monkeypatch.setattr("factormix.checkpoint.sha256", lambda _p: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        other.save_pretrained(folder, overwrite=True)
    assert {p.name: sha256(p) for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


KILLED = """
import os, signal, sys
import factormix.checkpoint as checkpoint, factormix.run.directory as directory
from tests.nn.sparse import twins
module, name = {place}
own = getattr(module, name)
def die(*a, **k):
    own(*a, **k)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(module, name, die)
twins("llama-bias", seed=1)[1].save_pretrained(sys.argv[1], overwrite=True)
"""
PLACES = ["checkpoint, 'write_json'", "checkpoint, 'sha256'", "directory, '_sync_tree'"]


@pytest.mark.parametrize("place", PLACES)
def test_kill_9_in_mid_save_leaves_the_old(place: str, folder: Path) -> None:
    before = {p.name: sha256(p) for p in folder.iterdir()}
    code = KILLED.format(place=f"({place})")
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=root, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-500:]
    assert {p.name: sha256(p) for p in folder.iterdir()} == before
    load(folder)


def test_a_dense_model_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(FactorMixError, match="LlamaForCausalLM has no sparse FFN"):
        save(tiny_model("llama"), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "options, named",
    [
        ({"push_to_hub": True}, "push_to_hub=True"),
        ({"safe_serialization": False}, "safe_serialization=False"),
        ({"variant": "fp16"}, r"\['variant'\]"),
        ({"save_dtype": "x", "a": 1}, r"\['a', 'save_dtype'\]"),
    ],
)
def test_other_arguments_are_refused(options: dict, named: str, tmp_path: Path) -> None:
    with pytest.raises(FactorMixError, match=rf"takes save_directory, tokenizer, .*not .*{named}"):
        twins("llama")[1].save_pretrained(tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    _, sparse = twins("llama")
    sparse.save_pretrained(tmp_path / "x", is_main_process=False)
    assert not list(tmp_path.iterdir())
    sparse.save_pretrained(tmp_path / "x", is_main_process=True, safe_serialization=True)
    assert is_factormix(tmp_path / "x")


def test_a_state_dict_of_ones_own(tmp_path: Path) -> None:
    _, sparse = twins("llama")
    doubled = {name: 2 * tensor for name, tensor in sparse.state_dict().items()}
    sparse.save_pretrained(tmp_path / "x", state_dict=doubled)
    loaded = load(tmp_path / "x").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in doubled.items())


def test_shards(tmp_path: Path) -> None:
    _, sparse = twins("llama")
    sparse.save_pretrained(tmp_path / "x", max_shard_size="40KB")
    shards = sorted((tmp_path / "x").glob("model.factormix-*.safetensors"))
    assert len(shards) > 1 and (tmp_path / "x" / "model.safetensors.index.factormix.json").is_file()
    assert torch.allclose(tiny_output(load(tmp_path / "x")), tiny_output(sparse), rtol=1e-5, atol=1e-6)
    shards[0].unlink()
    with pytest.raises(FactorMixError, match=f"{shards[0].name}' is missing"):
        load(tmp_path / "x")


def test_the_tokenizer_is_saved_along(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    twins("llama")[1].save_pretrained(tmp_path / "x", tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "x")("b a c").input_ids == [2, 1, 0]
    assert "tokenizer.json" in json.loads((tmp_path / "x" / HASHES).read_text())
    edit(tmp_path / "x", lambda t: t["model"]["vocab"].update(c=3), "tokenizer.json")
    with pytest.raises(FactorMixError, match=r"tokenizer\.json' was altered"):
        load(tmp_path / "x")


def test_every_file_is_hashed_and_readable(folder: Path) -> None:
    files = {p.name for p in folder.iterdir()}
    assert set(json.loads((folder / HASHES).read_text())) == files - {HASHES} >= {"config.json", WEIGHTS}
    umask = os.umask(0)
    os.umask(umask)
    for file in [folder, *folder.iterdir()]:
        assert stat.S_IMODE(file.stat().st_mode) & 0o444 == 0o444 & ~umask, file
    verify(folder)


def test_a_moved_directory_loads(folder: Path, tmp_path: Path) -> None:
    want = tiny_output(load(folder))
    shutil.move(folder, tmp_path / "elsewhere")
    assert torch.equal(tiny_output(load(str(tmp_path / "elsewhere"))), want)


def test_tied_heads_stay_tied(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    sparse = sparsify(model)
    sparse.save_pretrained(tmp_path / "x")
    assert "lm_head.weight" not in load_file(tmp_path / "x" / WEIGHTS)
    loaded = load(tmp_path / "x")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.allclose(tiny_output(loaded), tiny_output(sparse), rtol=1e-5, atol=1e-6)


def test_sliding_windows_survive(tmp_path: Path) -> None:
    _, sparse = twins("gemma2")
    sparse.save_pretrained(tmp_path / "x")
    loaded = load(tmp_path / "x")
    assert loaded.config.sliding_window == 8 and loaded.config.layer_types == sparse.config.layer_types
    ids = torch.arange(3, 33)[None]  # longer than the window
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, sparse(ids).logits, rtol=1e-5, atol=1e-6)


def test_the_generation_config_survives(tmp_path: Path) -> None:
    _, sparse = twins("llama")
    sparse.generation_config.max_new_tokens = 7
    sparse.save_pretrained(tmp_path / "x")
    assert load(tmp_path / "x").generation_config.max_new_tokens == 7


@pytest.mark.parametrize("family", ["llama", "t5-gated", "bert"])
def test_bfloat16_saved_and_loaded(family: str, tmp_path: Path) -> None:
    _, sparse = twins(family)
    sparse.save_pretrained(tmp_path / "f32")
    half = load(tmp_path / "f32", dtype=torch.bfloat16)
    assert {p.dtype for n, p in half.named_parameters() if "experts" in n or "router" in n} == {torch.bfloat16}
    half.save_pretrained(tmp_path / "bf16")
    again = load(tmp_path / "bf16")
    assert again.dtype == torch.bfloat16
    for name, tensor in half.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "cpu", "auto"])
def test_device_maps(device_map: object, folder: Path) -> None:
    model = load(folder, device_map=device_map)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert torch.allclose(tiny_output(model), tiny_output(load(folder)), rtol=1e-5, atol=1e-6)


def test_read_config_needs_no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    config = read_config(folder)
    assert config.architecture == "LlamaForCausalLM" and config.base_config["hidden_size"] == 32
    assert is_factormix(folder)
