"""`factormix demo` from fetch to report, on a tiny model in the place of the real one."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import factormix.cli.demo as module
from factormix import load
from factormix.cli import app
from factormix.factor.config import FactorConfig


@pytest.fixture
def small_world(llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The demo's assets replaced; gives the names it fetches."""
    fetched: list[str] = []

    def fetch(name: str, quiet: bool = False) -> Path:
        fetched.append(name)
        if name == "smollm2":
            return llama
        own = tmp_path / "texts" / f"{name}.txt"
        own.parent.mkdir(exist_ok=True)
        own.write_text(text.read_text())
        return own

    monkeypatch.setattr(module, "fetch", fetch)
    monkeypatch.setattr(module, "EVAL_TOKENS", 512)
    monkeypatch.setattr(module, "WINDOW", 32)
    monkeypatch.setattr(module, "HEAL_TOKENS", 2048)
    monkeypatch.setattr(
        module, "bench", functools.partial(module.bench, prefill_tokens=(16,), prompt_tokens=4, new_tokens=4, repeats=1)
    )
    monkeypatch.setattr(module, "answer", lambda model, tokenizer, prompt, tokens: f"{type(model).__name__} says")
    small = functools.partial(FactorConfig.parse, window=32, router_steps=10)
    monkeypatch.setattr(module.FactorConfig, "parse", small)
    return fetched


@pytest.mark.parametrize("full", [False, True])
def test_the_demo_writes_a_whole_report(full: bool, small_world: list[str], tmp_path: Path) -> None:
    words = ["demo", "--layout", "S1A1E4", "--tokens", "1024", "--quiet", "-o", str(tmp_path / "report")]
    result = CliRunner().invoke(app, [*words, *(["--full"] if full else [])], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert small_world == ["smollm2", module.CALIBRATION, *module.TEXTS]
    for part in ("brown-heldout", "paper preset", "geometric mean", "decode 1", "prefill 16", "dense:", "sparse:"):
        assert part in result.stdout, part
    report = tmp_path / "report"
    run = json.loads((report / "run.json").read_text())
    assert ("healing" in load(report / "model").config.factormix["made_by"]) == full
    assert run["metrics"]["FactorMix"]["perplexity"]["foldoc-test"]["ratio"] > 0
    assert (report / "report.md").is_file() and len(list((report / "plots").glob("*.png"))) == 4
    assert not list(tmp_path.glob("*.work"))
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2 and "--overwrite" in again.stderr
