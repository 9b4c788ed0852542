"""The report holds what it was given, unedited, with its pictures."""

import json
import sys

import pytest

from factormix.evaluate.perplexity import TextScore
from factormix.evaluate.report import write_report
from factormix.evaluate.speed import Bench, Run
from factormix.evaluate.suite import Evaluation
from factormix.run.errors import FactorMixError

RUN = {
    "command": "demo",
    "config": {"model": "smol", "layout": "S4A4E16", "partition": {"method": "kmeans"}},
    "phases": [{"name": "layer fit", "seconds": 240.0}],
    "tokens": 16384,
    "versions": {"torch": "2.13.0"},
    "data": {"brown-train": "ab" * 32},
    "threads": 2,
    "dtype": "float32",
    "seed": 0,
    "peak_memory_bytes": 3 * 2**30,
}
TALK = [{"prompt": "Why? | ```x```", "base": "Because.\n\n# Not a heading | ", "model": "  ````odd```` answer"}]
SITES = [
    {"site": f"l.{at}", "layer": at, "recall": 0.5, "captured": 0.75, "error_before": 0.6, "error_after": 0.4,
     "load": [0.2, 0.5, 0.3]}
    for at in range(3)
]  # fmt: skip


def evaluation(ratio):
    texts = {
        "brown": TextScore(20000, 40, 38.0 * ratio, 38.0, ratio, 0.025, 0.61, 0.8),
        "foldoc": TextScore(16384, 32, 27.0 * ratio, 27.0, ratio, 0.031, 0.62, 0.9),
    }
    return Evaluation(texts, in_domain=("brown",)).to_dict()


def timed():
    runs = [
        Run("decode", 1, "float32", 1, name, speed, (speed - 1, speed + 1), speed / 20, limit, 2**29)
        for name, speed, limit in (("dense", 20.0, 1.0), ("factormix", 27.0, 1.68))
    ]
    return Bench(tuple(runs), {"dtype": "float32", "threads": 1, "repeats": 5}).to_dict()


def test_report_has_its_parts(tmp_path):
    methods = {"FactorMix": evaluation(2.25), "paper preset": evaluation(40.0), "static pruning": evaluation(3.5)}
    path = write_report(tmp_path / "report", RUN, methods, timed(), SITES, TALK)
    text = path.read_text()
    for heading in ("What was done", "Quality", "Speed", "The 3 FFNs", "Answers", "Configuration"):
        assert f"## {heading}" in text
    row = next(line for line in text.splitlines() if line.startswith("| brown (in-domain)"))
    assert "× 2.250 ± 0.025" in row and "× 40.000" in row and "× 3.500" in row and "20,000" in row
    assert "| foldoc (foreign)" in text and "geometric mean, foreign" in text
    assert "× 1.35 | × 1.68" in text and "27 (26–28)" in text
    for fact in ("S4A4E16", "kmeans", "torch 2.13.0", "ab" * 32, "16,384", "4.0 min", "3.00 GiB"):
        assert fact in text
    for name in ("perplexity", "speed", "sites", "load"):
        assert f"(plots/{name}.png)" in text
        assert (path.parent / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((path.parent / "run.json").read_text())["config"] == RUN["config"]
    results = json.loads((path.parent / "results.json").read_text())
    assert results["evaluation"] == json.loads(json.dumps(methods))
    assert results["answers"] == TALK


def test_answers_are_unedited_and_cannot_break_out(tmp_path):
    lines = write_report(tmp_path, RUN, evaluation(2.0), {}, (), TALK).read_text().splitlines()
    opened = lines.index("`````text")  # one more than the longest run inside
    assert lines[opened + 1 : opened + 3] == [TALK[0]["model"], "`````"]
    assert "\n".join(lines).count(TALK[0]["base"]) == 1
    assert lines[lines.index("**dense**") + 2] == "```text"


def test_only_what_there_is_data_for(tmp_path):
    path = write_report(tmp_path, RUN, evaluation(2.0), {})
    text = path.read_text()
    assert "## Quality" in text and "FactorMix" in text
    assert not any(heading in text for heading in ("## Speed", "FFNs", "## Answers"))
    assert [file.name for file in (tmp_path / "plots").iterdir()] == ["perplexity.png"]
    write_report(tmp_path / "bare", {}, {}, {})


def test_several_named_answers(tmp_path):
    three = [{"prompt": "Why?", "answers": {"dense": "a", "FactorMix": "b", "paper preset": "c"}}]
    text = write_report(tmp_path, RUN, {}, {}, (), three).read_text()
    assert "**paper preset**" in text


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(FactorMixError, match=r"factormix\[plot\]"):
        write_report(tmp_path / "report", RUN, evaluation(2.0), {})
    assert not (tmp_path / "report" / "report.md").exists()
