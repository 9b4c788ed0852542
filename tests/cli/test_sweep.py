"""A grid of recipes: cells run once, go on after a kill, and end in a table and a plot."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from factormix.cli import app
from factormix.cli.sweep import run_command
from factormix.run.errors import FactorMixError


@pytest.fixture
def recipe(llama: Path, text: Path, tmp_path: Path) -> Path:
    file = tmp_path / "grid.yaml"
    file.write_text(
        f"model: {llama}\ntext: [{text}]\ntokens: 512\nwindow: 32\nrouter_steps: 5\nfit_passes: 0\n"
        "sweep: {layout: [S1A1E4, S2A1E4], preset: [default, flap]}\n"
        f"eval: {{text: [{text}], tokens: 512, window: 32}}\n"
    )
    return file


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Commands run in this process, by their first word and folder; the third fails once."""
    seen: list[str] = []

    def here(words: list[str]) -> None:
        seen.append(words[0])
        if len(seen) == 4:
            raise FactorMixError("killed")
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output

    monkeypatch.setattr("factormix.cli.sweep.run_command", here)
    return seen


def test_a_killed_sweep_goes_on_and_finished_cells_are_skipped(
    run: Callable[..., str], recipe: Path, ran: list[str], tmp_path: Path
) -> None:
    assert "4 cells" in run("sweep", recipe, "-o", "out", "--dry-run") and not Path("out").exists()
    assert CliRunner().invoke(app, ["sweep", str(recipe), "-o", "out", "--quiet"]).exit_code == 2
    assert ran == ["factor", "eval", "factor", "eval"]  # the second eval was killed
    said = run("sweep", recipe, "-o", "out", "--quiet")
    assert ran[4:] == ["eval", "factor", "eval", "factor", "eval"]
    assert "| S1A1E4 | flap |" in said
    rows = list(csv.DictReader(Path("out/sweep.csv").read_text().splitlines()))
    assert [(row["layout"], row["preset"]) for row in rows] == [
        (layout, preset) for layout in ("S1A1E4", "S2A1E4") for preset in ("default", "flap")
    ]
    # a router or a compensating bias makes the fraction of a tiny FFN's parameters a little larger than its neurons'
    assert [round(float(row["active_fraction"]), 1) for row in rows] == [0.5, 0.5, 0.8, 0.8]
    assert all(float(row["ratio_all"]) > 0 and float(row["seconds"]) > 0 for row in rows)
    assert rows[0]["ratio_in_domain"] == rows[0]["ratio_all"]  # it was calibrated on that text
    assert Path("out/sweep.png").stat().st_size > 5000
    assert not list(Path("out").glob("*/model"))
    before = len(ran)
    run("sweep", recipe, "-o", "out", "--quiet")
    assert len(ran) == before


def test_a_cell_of_another_recipe_is_not_overwritten(
    run: Callable[..., str], recipe: Path, ran: list[str], tmp_path: Path
) -> None:
    (tmp_path / "out" / "layout-S1A1E4_preset-default").mkdir(parents=True)
    Path("out/layout-S1A1E4_preset-default/cell.json").write_text(json.dumps({"recipe": {}, "eval": {}}))
    result = CliRunner().invoke(app, ["sweep", str(recipe), "-o", "out"])
    assert result.exit_code == 2 and "another recipe" in result.stderr and not ran


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Every command's words; nothing runs, but what a cell leaves is there."""
    seen: list[list[str]] = []

    def pretend(words: list[str]) -> None:
        seen.append([str(word) for word in words])
        if words[0] == "factor":
            folder = Path(words[words.index("-o") + 1])
            folder.mkdir()
            metrics = {"active_fraction": 0.5, "parameters_per_token": 10}
            made = {"metrics": metrics, "phases": [], "peak_memory_bytes": 1}
            (folder / "run.json").write_text(json.dumps(made))
        else:
            means = dict.fromkeys(("in_domain", "foreign", "all"), 2.0)
            scores = {"mean_ratio": means, "agreement": {}, "perplexity": {}, "retention": None}
            Path(words[words.index("--json") + 1]).write_text(json.dumps(scores))

    monkeypatch.setattr("factormix.cli.sweep.run_command", pretend)
    return seen


def test_nested_keys_are_set_cell_by_cell_and_the_flags_reach_both_commands(
    run: Callable[..., str], pretended: list[list[str]]
) -> None:
    Path("g.yaml").write_text(
        "model: m\nheal: {lr: 0.5}\nsweep: {heal.tokens: [0, 64]}\neval: {text: [a.txt, b.txt], last_word_tokens: 99}\n"
    )
    run("sweep", "g.yaml", "-o", "out", "--dtype", "bfloat16", "--device", "cpu", "--keep-models", "--quiet")
    cells = sorted(Path("out").glob("*/"))
    assert [cell.name for cell in cells] == ["heal.tokens-0", "heal.tokens-64"]
    made = [yaml.safe_load((cell / "recipe.yaml").read_text()) for cell in cells]
    assert [recipe["heal"] for recipe in made] == [{"lr": 0.5, "tokens": 0}, {"lr": 0.5, "tokens": 64}]
    assert all((cell / "model").is_dir() for cell in cells)  # --keep-models
    assert [words[0] for words in pretended] == ["factor", "eval"] * 2
    for words in pretended:
        assert words[-5:] == ["--device", "cpu", "--dtype", "bfloat16", "--quiet"]
    factor, evaluate = pretended[:2]
    assert factor[1:5] == ["--recipe", "out/heal.tokens-0/recipe.yaml", "-o", "out/heal.tokens-0/model"]
    assert evaluate[1:6] == ["out/heal.tokens-0/model", "--against", "m", "--json", "out/heal.tokens-0/eval.json"]
    assert evaluate[6:12] == ["--text", "a.txt", "--text", "b.txt", "--last-word-tokens", "99"]


def test_other_flags_for_eval_are_another_sweep(run: Callable[..., str], pretended: list[list[str]]) -> None:
    Path("g.yaml").write_text("model: m\nsweep: {seed: [0]}\neval: {tokens: 5}\n")
    run("sweep", "g.yaml", "-o", "out", "--quiet")
    Path("g.yaml").write_text("model: m\nsweep: {seed: [0]}\neval: {tokens: 6}\n")
    result = CliRunner().invoke(app, ["sweep", "g.yaml", "-o", "out"])
    assert result.exit_code == 2 and "another recipe" in result.stderr and len(pretended) == 2


def test_a_command_runs_in_a_process_of_its_own_and_its_failure_is_said() -> None:
    """One process, one import of torch: the refusal of a model that is not there."""
    with pytest.raises(FactorMixError, match=r"inspect no/such/model` failed with exit code 2; .* go on"):
        run_command(["inspect", "no/such/model"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("sweep: {layout: [S1A1E4, S1A9E4]}", ["cell layout-S1A9E4", "S1A9E4"]),
        ("sweep: {layot: [S1A1E4]}", ["'layot'", "Did you mean 'layout'?"]),
        ("sweep: {layout: S1A1E4}", ["lists"]),
        ("seed: 1", ["`sweep`"]),
        ("sweep: {seed: [1]}\neval: {suit: core}", ["'suit'", "Did you mean 'suite'?"]),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    refused: Callable[..., str], tmp_path: Path, line: str, words: list[str]
) -> None:
    (tmp_path / "g.yaml").write_text(f"model: m\n{line}\n")
    message = refused("sweep", "g.yaml", "-o", "out")
    assert all(word in message for word in words), message
