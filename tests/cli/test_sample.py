"""`factormix sample`: a model's own text in a file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from factormix.cli import app
from factormix.cli import sample as command
from factormix.data.own_words import own_words
from factormix.data.text import read_documents

SMALL = ("--batch", 4, "--max-new-tokens", 12, "--tokens", 60)


def test_documents(run: Callable[..., str], llama: Path) -> None:
    said = run("sample", llama, "-o", "own.jsonl", *SMALL)  # no chat template: documents
    documents = read_documents("own.jsonl")
    assert documents.kind == "text" and f"{len(documents)} text documents" in said
    assert 60 <= sum(len(text.split()) for text in documents.texts) < 60 + 4 * 12
    run("sample", llama, "-o", "other.jsonl", *SMALL, "--seed", 1)
    assert read_documents("other.jsonl").texts != documents.texts


def test_a_killed_run_goes_on(run: Callable[..., str], llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def dies_in_the_second(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own_words(*arguments, **options)

    words = ["sample", llama, "-o", "own.jsonl", *SMALL]
    monkeypatch.setattr(command, "own_words", dies_in_the_second)
    CliRunner().invoke(app, [str(word) for word in words])
    assert Path("own.jsonl.work/batch-00000.json").is_file() and not Path("own.jsonl").exists()
    run(*words)
    assert not Path("own.jsonl.work").exists()
    shutil.move("own.jsonl", "resumed.jsonl")
    again = len(calls)
    run(*words)
    assert Path("own.jsonl").read_bytes() == Path("resumed.jsonl").read_bytes()
    assert len(calls) - again == again - 1  # the resumed run did not make the first batch anew


@pytest.mark.parametrize("has", [False, True])
def test_it_says_where_bfloat16_is_slow_and_how_far_a_batch_is(
    llama: Path, monkeypatch: pytest.MonkeyPatch, has: bool, tmp_path: Path
) -> None:
    monkeypatch.setattr("factormix.run.progress.LOG_SECONDS", 0)
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: has)
    words = ["sample", llama, "-o", tmp_path / "own.jsonl", *SMALL, "--dtype", "bfloat16"]
    said = CliRunner().invoke(app, [str(word) for word in words]).stderr
    assert ("no AVX-512" in said) is not has
    assert "this batch: 1 tokens a text" in said and "this batch: 12 tokens a text" in said
    assert "this batch: 13" not in said  # the next batch begins anew


def test_refuses(refused: Callable[..., str], llama: Path, text: Path) -> None:
    assert ".jsonl" in refused("sample", llama, "-o", "own.txt")
    assert "chat template" in refused("sample", llama, "-o", "own.jsonl", "--kind", "chat")
    existing = text.with_name("there.jsonl")
    existing.write_text("{}\n", encoding="utf-8")
    assert "--overwrite" in refused("sample", llama, "-o", existing)
