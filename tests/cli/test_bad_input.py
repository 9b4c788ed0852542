"""What a user can get wrong: exit code 2, one line with the value and the remedy, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM
from typer.testing import CliRunner

from factormix.cli import app
from factormix.run.errors import FactorMixError
from tests.cli.tiny import CUT

Refused = Callable[..., str]


@pytest.fixture
def copy(sparse: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sparse, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--layout", "S1A1E5"), ["S1A1E5", "64 neurons", "12.80", "4, 8"]),
        (("--layout", "S1A4E4"), ["S1A4E4", "R = E - S", "3"]),
        (("--layout", "four"), ["'four'", "S4A4E16"]),
        (("--partition", "coactivaton"), ["'coactivaton'", "'kmeans'", "Did you mean 'coactivation'?"]),
        (("--tokens", "0"), ["tokens", "0", "at least 1"]),
        (("--tokens", "1000000"), ["too little text", "4,0"]),
        (("--tokens", "16"), ["tokens 16", "32"]),
        (("--layers", "7"), ["[7]", "0 to 1"]),
        (("--layers", "0,7"), ["[7]", "0 to 1"]),
        (("--layers", "0;1"), ["--layers '0;1'", "0,1,2"]),
        (("--gate", "paper"), ["gate 'paper'", "S0A1E4"]),
        (("--preset", "papers"), ["'papers'", "Did you mean 'paper'?"]),
        (("--dtype", "float23"), ["'float23'", "Did you mean 'float32'?"]),
        (("--device", "gpu"), ["'gpu'", "cpu"]),
        (("--json", "no/such/place.json"), ["no/such/place.json", "directory"]),
        (("--recipe", "absent.yaml"), ["'absent.yaml'", "No such file"]),
    ],
)
def test_options(refused: Refused, llama: Path, text: Path, flags: tuple[str, ...], words: list[str]) -> None:
    message = refused("factor", llama, "-o", "out", "--text", text, *CUT, *flags)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("empty.txt", b"\n \n", ["empty.txt", "is empty"]),
        ("binary.txt", b"w1 \0 w2", ["binary.txt", "binary", "byte 3"]),
        ("latin.txt", "w1 caf\xe9".encode("latin-1"), ["latin.txt", "not UTF-8", "0xe9", "iconv"]),
        ("short.txt", b"w1 w2 w3", ["too little text", "3 tokens"]),
        ("odd.csv", b"w1,w2", ["odd.csv", ".jsonl"]),
        (None, b"", ["absent.txt", "does not exist"]),
    ],
)
def test_text(refused: Refused, llama: Path, tmp_path: Path, name: str | None, data: bytes, words: list[str]) -> None:
    file = tmp_path / (name or "absent.txt")
    if name:
        file.write_bytes(data)
    message = refused("factor", llama, "-o", "out", "--text", file, *CUT)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./lama", ["'./lama'", "does not exist", "Did you mean"]),
        ("owner/nowhere", ["'owner/nowhere'", "hub", "Check the name"]),
        ("empty-folder", ["'empty-folder'", "config.json"]),
        ("asset:smolm2", ["'smolm2'", "Did you mean 'smollm2'?"]),
        ("weights.gguf", ["'weights.gguf'", "does not exist"]),
        ("fake.gguf", ["'fake.gguf'", "GGUF"]),
        ("file.txt", ["'file.txt'", "is a file"]),
    ],
)
def test_no_such_model(refused: Refused, text: Path, tmp_path: Path, name: str, words: list[str]) -> None:
    Path("empty-folder").mkdir()
    Path("llama").mkdir()
    Path("file.txt").write_text("w1", encoding="utf-8")
    Path("fake.gguf").write_text("no such thing", encoding="utf-8")
    for command in (("inspect", name), ("generate", name, "w1"), ("factor", name, "-o", "out", "--text", text, *CUT)):
        message = refused(*command)
        assert all(word in message for word in words), message


def test_no_ffn_found(refused: Refused, text: Path, tmp_path: Path) -> None:
    MambaForCausalLM(MambaConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1)).save_pretrained("mamba")
    message = refused("factor", "mamba", "-o", "out", "--text", text, *CUT)
    assert "'mamba'" in message and "Known families" in message and "FAMILIES" in message


def test_a_sparse_model_is_not_factored_again(refused: Refused, sparse: Path, text: Path) -> None:
    assert "sparse already" in refused("factor", sparse, "-o", "out", "--text", text, *CUT)


@pytest.mark.parametrize("what", ["sparse", "dense"])
def test_a_truncated_checkpoint_is_named(refused: Refused, request: pytest.FixtureRequest, what: str) -> None:
    origin = request.getfixturevalue("sparse" if what == "sparse" else "llama")
    shutil.copytree(origin, "cut")
    (weights,) = Path("cut").glob("model*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    message = refused("generate", "cut", "w1")
    assert str(weights) in message and "truncated" in message


def test_a_missing_weight_is_not_made_up(refused: Refused, llama: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(llama, "holes")
    tensors = load_file("holes/model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, "holes/model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refused("generate", "holes", "w1")


@pytest.mark.parametrize("damage", ["a number", "not JSON", "another family", "a tokenizer"])
def test_altered_files_are_named(refused: Refused, copy: Path, damage: str) -> None:
    file = copy / ("tokenizer.json" if damage == "a tokenizer" else "config.json")
    content = file.read_text(encoding="utf-8")
    if damage == "not JSON":
        content = content[:-20]
    elif damage == "another family":
        content = json.dumps({**json.loads(content), "model_type": "llama"})
    else:
        content = content.replace("2", "3", 1)
    file.write_text(content, encoding="utf-8")
    message = refused("generate", copy, "w1")
    assert str(file) in message and "altered" in message


def test_a_dense_config_that_does_not_fit_its_weights(refused: Refused, llama: Path) -> None:
    shutil.copytree(llama, "altered")
    config = json.loads(Path("altered/config.json").read_text(encoding="utf-8"))
    Path("altered/config.json").write_text(json.dumps({**config, "intermediate_size": 32}), encoding="utf-8")
    assert "'altered'" in refused("generate", "altered", "w1")
    Path("altered/config.json").write_text("{", encoding="utf-8")
    assert "'altered'" in refused("generate", "altered", "w1")


def test_no_tokenizer(refused: Refused, llama: Path, text: Path) -> None:
    shutil.copytree(llama, "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    assert "tokenizer" in refused("factor", "mute", "-o", "out", "--text", text, *CUT)


def test_nan_in_the_model(refused: Refused, llama: Path, text: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(shutil.copytree(llama, "nan"))
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained("nan")
    assert "NaN" in refused("factor", "nan", "-o", "out", "--text", text, *CUT)


def test_a_result_that_cannot_be_written(refused: Refused, llama: Path) -> None:
    if Path("/proc/self").exists():  # a directory in which nobody can make a file
        assert "/proc/" in refused("inspect", llama, "--json", "/proc/result.json")


def test_existing_output(refused: Refused, llama: Path, text: Path) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("precious", encoding="utf-8")
    message = refused("factor", llama, "-o", "out", "--text", text, *CUT)
    assert "--overwrite" in message and str(Path("out").resolve()) in message
    assert Path("out/mine.txt").read_text(encoding="utf-8") == "precious"


def test_output_that_cannot_be_written(refused: Refused, llama: Path, text: Path) -> None:
    Path("file").write_text("", encoding="utf-8")
    assert "file" in refused("factor", llama, "-o", "file/out", "--text", text, *CUT)
    assert "existing file" in refused("factor", llama, "-o", "file", "--text", text, *CUT)
    if os.geteuid():  # root may write everywhere
        Path("closed").mkdir(mode=0o500)
        assert "permission" in refused("factor", llama, "-o", "closed/out", "--text", text, *CUT)


def test_a_foreign_work_directory_is_left_alone(refused: Refused, llama: Path, text: Path) -> None:
    Path("out.work").mkdir()
    Path("out.work/notes.txt").write_text("mine", encoding="utf-8")
    message = refused("factor", llama, "-o", "out", "--text", text, "--overwrite", *CUT)
    assert "out.work" in message and "not a FactorMix work directory" in message


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("layuot: S1A1E4", ["'layuot'", "Did you mean 'layout'?", "r.yaml"]),
        ("heal: {token: 5}", ["'token'", "Did you mean 'tokens'?", "r.yaml"]),
        ("heal: 5", ["heal", "5"]),
        ("tokens: many", ["'many'", "int"]),
        ("[1, 2]", ["[1, 2]", "mapping"]),
        ("a: {", ["not YAML", "r.yaml"]),
        ("layout: S1A1E5\nmodel: MODEL", ["S1A1E5", "64 neurons"]),
    ],
)
def test_recipes(refused: Refused, llama: Path, text: Path, recipe: str, words: list[str]) -> None:
    Path("r.yaml").write_text(recipe.replace("MODEL", str(llama)), encoding="utf-8")
    for command in (("validate", "r.yaml"), ("factor", llama, "-o", "out", "--text", text, "--recipe", "r.yaml")):
        message = refused(*command)
        assert all(word in message for word in words), message


def test_commands_that_lack_something(refused: Refused, sparse: Path, llama: Path, text: Path) -> None:
    assert "-o OUT" in refused("factor", llama)
    assert "--text" in refused("eval", sparse)
    assert "'word'" in refused("eval", sparse, "--text", text, "--in-domain", "word", "--window", 32)
    assert "64" in refused("bench", sparse, "--prefill", 65)
    assert "'int8'" in refused("bench", sparse, "--dtype", "int8")
    assert "Did you mean 'active-width'" in refused("bench", sparse, "--beside", "activewidth")
    assert "--against" in refused("bench", sparse, "--no-prefill", "--beside", "active-width")
    assert "leave --quantize out" in refused("bench", sparse, "--beside", "active-width", "--quantize", "int8")
    assert all(
        "'int4'" in refused(*each, "--quantize", "int4") for each in (("bench", sparse), ("generate", sparse, "a"))
    )
    assert "no MODEL" in refused("bench")
    assert "--layout S1A1E4" in refused("bench", sparse, "--layout", "S1A1E4")
    assert "leave MODEL" in refused("bench", sparse, "--shape", "tinyllama")
    assert "1.5" in refused("inspect", llama, "--active", 1.5)
    assert "prompt" in refused("generate", sparse, " ")
    shutil.copyfile(text, "words.txt")
    assert "stem 'words'" in refused("eval", sparse, "--text", text, "--text", "words.txt")


def test_the_traceback_is_shown_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACTORMIX_TRACEBACK", "1")
    assert isinstance(CliRunner().invoke(app, ["inspect", "./none"]).exception, FactorMixError)


def test_experts_that_cannot_be_kept(refused: Refused, sparse: Path, llama: Path, text: Path) -> None:
    keep = ("--keep-experts-for", text, "-o", "out")
    assert "is dense" in refused("factor", llama, *keep, "--layout", "S2A0E4")
    assert "S1A0E4 to S3A0E4" in refused("factor", sparse, *keep)
    assert "goes with keep_experts_for" in refused("factor", llama, "-o", "out", "--against", llama)
    assert "leave text and task out" in refused("factor", sparse, *keep, "--layout", "S2A0E4", "--text", text)
