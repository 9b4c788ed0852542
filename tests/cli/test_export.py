"""export from the command line: directory, card, record, JSON, refusals, push."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import factormix
from factormix.cli.recipe import Recipe
from factormix.export.card import PLACES
from factormix.run.config import describe
from factormix.run.directory import sha256

Run = Callable[..., str]


@pytest.fixture
def long_text(tmp_path: Path) -> Path:
    from tests.cli.tiny import write_text

    return write_text(tmp_path / "long.txt", documents=60)


def test_export_writes_a_stock_directory_with_its_card(sparse: Path, llama: Path, long_text: Path, run: Run) -> None:
    scores = {"perplexity": {"long": {"base": 90.0, "model": 99.0, "ratio": 1.1}}}
    speed = {"decode": {"1": {"base": 10.0, "model": 15.0, "ratio": 1.5}},
             "settings": {"machine": "a machine", "dtype": "float32", "threads": 1}}  # fmt: skip
    for name, values in (("eval.json", scores), ("bench.json", speed)):
        Path(name).write_text(json.dumps(values))
    said = run("export", sparse, "-o", "out", "--text", long_text, "--json", "e.json", "--quiet", "--licence", "MIT",
               "--base", "me/llama", "--results", "eval.json", "--results", "bench.json")  # fmt: skip
    assert "GraniteMoeSharedForCausalLM" in said and "4,096 tokens" in said
    record, result = (json.loads(Path(p).read_text()) for p in ("out/run.json", "e.json"))
    assert result["schema_version"] == 1 and result["container"] == "granite" == record["metrics"]["container"]
    assert record["data"] == {long_text.name: sha256(long_text)} and record["tokens"] == 4096
    assert type(AutoModelForCausalLM.from_pretrained("out")).__name__ == result["architecture"]
    tokenizer, own = AutoTokenizer.from_pretrained("out"), AutoTokenizer.from_pretrained(llama)
    assert tokenizer("w1 w2")["input_ids"] == own("w1 w2")["input_ids"]
    assert type(factormix.load("out")).__name__ == "FactorMixLlamaForCausalLM"
    header, card = Path("out/README.md").read_text().removeprefix("---\n").split("---\n", 1)
    header = yaml.safe_load(header)
    assert header["license"] == "mit" and header["base_model"] == "me/llama" and "granite" in header["tags"]
    for part in ("S1A1E4", "vllm serve out", f"2^-{result['m']}", "long | 90 | 99 | 1.1", "decode 1 | 10 | 15 | 1.5"):
        assert part in card, part
    assert str(llama.parent) not in card  # where the maker had things
    run("eval", "out", "--against", llama, "--text", long_text, "--tokens", 128, "--window", 32)  # a MODEL like any


def test_export_refuses(sparse: Path, llama: Path, text: Path, refused: Callable[..., str]) -> None:
    assert "no FactorMix directory" in refused("export", llama, "-o", "out")
    assert "needs -o DIR" in refused("export", sparse)
    assert "Did you mean 'granite'" in refused("export", sparse, "-o", "out", "--to", "granit", "--text", text)
    assert "no JSON of eval or bench" in refused("export", sparse, "-o", "out", "--results", text)
    assert "no shared neurons" in refused("export", sparse, "-o", "out", "--to", "mixtral", "--text", text)
    assert "OWNER/NAME" in refused("export", sparse, "-o", "out", "--push", "name")


def test_push(
    sparse: Path, long_text: Path, run: Run, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    seen: dict[str, Any] = {}

    class Api:
        def create_repo(self, name: str, exist_ok: bool) -> None:
            seen["made"] = name

        def upload_folder(self, repo_id: str, folder_path: Path) -> str:
            seen["files"] = {path.name for path in folder_path.iterdir()}
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "hub login" in refused("export", sparse, "-o", "out", "--push", "me/it", "--text", long_text)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    assert "https://hub/me/it" in run("export", sparse, "-o", "out", "--push", "me/it", "--text", long_text, "--quiet")
    assert (
        seen["made"] == "me/it" and {"README.md", "config.json", "model.safetensors", "factormix.json"} <= seen["files"]
    )
    assert "me/it" in Path("out/README.md").read_text()


def test_the_card_leaves_out_all_that_names_the_makers_files() -> None:
    own = {each.name for each in describe(Recipe)} - {"config", "preset"}
    assert own == set(PLACES)
