"""`factormix show` from end to end on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import factormix
from factormix.data.text import read_documents
from factormix.show import summarise, trace

Run = Callable[..., str]


def test_show(run: Run, sparse: Path, text: Path, tmp_path: Path) -> None:
    said = run("show", sparse, "--text", text, "-o", "page.html", "--tokens", 150, "--json", "page.json")
    assert "page.html: 150 tokens, experts at 2 sites" in said
    page = Path("page.html").read_text(encoding="utf-8")
    assert f"<title>{sparse.name} reads words</title>" in page
    numbers = json.loads(Path("page.json").read_text(encoding="utf-8"))
    found = trace(factormix.load(sparse), AutoTokenizer.from_pretrained(sparse), [read_documents(text)], tokens=150)
    assert numbers == summarise(found)
    assert numbers["schema_version"] == 1 and numbers["tokens"] == 150 and not numbers["whole"]
    assert numbers["groups"]["document"] == [{"name": "words 1", "tokens": 100}, {"name": "words 2", "tokens": 50}]
    assert all(sum(site["mean"]) == pytest.approx(site["active"], abs=1e-3) for site in numbers["sites"])


def test_an_existing_page_is_replaced_only_when_asked(run: Run, refused: Run, sparse: Path, text: Path) -> None:
    Path("page.html").write_text("mine")
    assert "'page.html' exists" in refused("show", sparse, "--text", text, "-o", "page.html")
    assert Path("page.html").read_text() == "mine"
    run("show", sparse, "--text", text, "-o", "page.html", "--tokens", 20, "--overwrite", "--quiet")
    assert "<title>" in Path("page.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no text to show"),
        (("--text", "absent.txt"), "'absent.txt' does not exist"),
        (("--tokens", "0"), "tokens received 0"),
        (("--dtype", "float23"), "Did you mean 'float32'"),
        (("--json", "no/such.json"), "no/such.json"),
        (("-o", "page.pdf"), "allowed: .html"),
    ],
)
def test_bad_input(refused: Run, sparse: Path, text: Path, words: tuple[str, ...], message: str) -> None:
    given = {"--text": str(text), "-o": "page.html", **dict(zip(words[::2], words[1::2]))}
    if not words:
        del given["--text"]
    assert message in refused("show", sparse, *(word for pair in given.items() for word in pair))


def test_a_dense_model(refused: Run, llama: Path, text: Path) -> None:
    message = refused("show", llama, "--text", text, "-o", "page.html")
    assert "LlamaForCausalLM has no sparse FFN" in message and "factormix factor" in message
