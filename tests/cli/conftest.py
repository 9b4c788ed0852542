"""A tiny saved model, a text it can read, and a way to run commands."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from factormix.cli import app
from tests.cli.tiny import CUT, save_tiny, write_text


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order: two runs of the same work are bit-equal."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """An empty working directory, no hub, one thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("FACTORMIX_TRACEBACK", raising=False)
    with one_thread():
        yield


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(scope="session")
def sparse(llama: Path, text: Path) -> Path:
    """The llama made sparse, FFNs alike so that it can be exported, once for all tests; they must not change it."""
    out = llama.parent / "sparse"
    with one_thread():
        words = ["factor", str(llama), "-o", str(out), "--text", str(text), "--quiet", "--allocation", "uniform", *CUT]
        result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def run() -> Callable[..., str]:
    """Run a command that must succeed; gives its stdout."""

    def call(*words: object) -> str:
        result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    return call


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Run a command that must be refused, and leave nothing behind; gives its message."""

    def call(*words: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
        assert result.stdout == "" and "Traceback" not in result.stderr
        assert sorted(tmp_path.rglob("*")) == before
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, result.stderr
        return errors[0]

    return call
