"""A grid of recipes: cells run once, go on after a kill, and end in a table and a plot."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from factormix.cli import app
from factormix.run.errors import FactorMixError

sweep_module = pytest.importorskip("factormix.cli.sweep")


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
