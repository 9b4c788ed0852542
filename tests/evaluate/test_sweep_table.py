"""The table of a sweep: each column from where it says, gaps where there is no number."""

import csv
import sys

import pytest

from factormix.evaluate.sweep_table import MEASURES, sweep_row, write_sweep

RUN = {
    "metrics": {"active_fraction": 0.5, "parameters_per_token": 1000},
    "phases": [{"name": "load", "seconds": 1.5}, {"name": "factorize", "seconds": 10.0}],
    "peak_memory_bytes": 2**30,
}
SCORES = {
    "perplexity": {"brown": {"ratio": 1.5}, "foldoc": {"ratio": 3.0}},
    "agreement": {"brown": {"top1": 0.8, "kl": 0.25}, "foldoc": {"top1": 0.6, "kl": 0.75}},
    "mean_ratio": {"all": 2.12, "in_domain": 1.5, "foreign": 3.0},
    "retention": {"all": {"retention": 0.9, "interval": [0.85, 0.95]}, "choice": None},
}


def test_a_row_is_of_the_run_and_its_evaluation():
    row = sweep_row({"layout": "S4A4E16", "heal.tokens": 0}, RUN, SCORES)
    assert row == {
        "layout": "S4A4E16", "heal.tokens": 0, "active_fraction": 0.5, "ratio_in_domain": 1.5, "ratio_foreign": 3.0,
        "ratio_all": 2.12, "top1": pytest.approx(0.7), "kl": pytest.approx(0.5), "retention": 0.9,
        "retention_low": 0.85, "retention_high": 0.95, "seconds": 11.5, "peak_bytes": 2**30,
        "parameters_per_token": 1000, "ratio brown": 1.5, "ratio foldoc": 3.0,
    }  # fmt: skip
    assert set(MEASURES) < set(row)


def test_without_tasks_or_agreement_there_are_gaps():
    none = {"brown": {"top1": None, "kl": None}}
    row = sweep_row({}, RUN, SCORES | {"retention": {"all": None}, "agreement": none})
    assert [row[key] for key in ("retention", "retention_low", "retention_high", "top1", "kl")] == [None] * 5


def test_files_hold_every_row_and_a_gap_is_no_zero(tmp_path, monkeypatch):
    rows = [sweep_row({"layout": layout, "seed": 0}, RUN, SCORES) for layout in ("S4A4E16", "S2A2E16")]
    rows[1] |= {"retention": None, "ratio_foreign": None, "active_fraction": 0.25, "ratio pubmed": 4.0}
    write_sweep(tmp_path, ["layout", "seed"], rows)
    table = list(csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines()))
    assert [(row["layout"], row["active_fraction"], row["retention"]) for row in table] == [
        ("S4A4E16", "0.5", "0.9"), ("S2A2E16", "0.25", ""),
    ]  # fmt: skip
    assert [row["ratio pubmed"] for row in table] == ["", "4.0"]  # a text that only one cell was judged on
    lines = (tmp_path / "sweep.md").read_text().splitlines()
    assert "| layout | seed | active fraction | ratio in domain | ratio foreign | ratio all | top1 | retention |" in (
        lines[4].replace(" seconds |", "")
    )
    assert lines[7] == "| S2A2E16 | 0 | 0.25 | 1.5 | – | 2.12 | 0.7 | – | 11.5 |"
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG") and "(sweep.png)" in lines[-1]
    write_sweep(tmp_path, ["layout", "seed"], [rows[0] | {"layout": "a|b"}])
    assert (tmp_path / "sweep.md").read_text().splitlines()[6].startswith(r"| a\|b | 0 | 0.5 |")
    (tmp_path / "sweep.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_sweep(tmp_path, ["layout", "seed"], rows)
    assert not (tmp_path / "sweep.png").exists() and "sweep.png" not in (tmp_path / "sweep.md").read_text()
