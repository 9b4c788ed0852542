"""A reader's table of speeds: a row a setting, columns only for what was timed."""

import json
import sys

from factormix.evaluate.speed import Bench, Run
from factormix.evaluate.speed_table import speed_table, write_speed


def bench(*names):
    speeds = {"dense": 20.0, "factormix": 27.0, "active-width": 30.0, "transformers-eager": 10.0}
    runs = [
        Run(phase, size, "float32", 1, name, speeds[name], (speeds[name] - 1, speeds[name] + 1),
            speeds[name] / 20 if "dense" in names else None,
1.5, 2**20 * (400 + at), 1e9)
        for phase, size in (("decode", 4), ("prefill", 512))
        for at, name in enumerate(names)
    ]  # fmt: skip
    settings = {"dtype": "float32", "threads": 1, "repeats": 7, "machine": "two cores", "device": "cpu", "torch": "2"}
    return Bench(tuple(runs), settings).to_dict()


def test_columns_are_of_what_was_timed():
    head, _, decode, prefill = speed_table(bench("dense", "factormix")["runs"])
    assert head == "| phase | dtype | threads | dense | FactorMix | ratio | limit | memory, dense / FactorMix |"
    assert decode == (
        "| decode, batch 4 | float32 | 1 | 20 (19–21) | 27 (26–28) | × 1.35 | × 1.50 | 400 MiB / 401 MiB |"
    )
    assert prefill.startswith("| prefill, 512 tokens |")
    head, _, decode, _ = speed_table(bench("dense", "factormix", "active-width", "transformers-eager")["runs"])
    assert "| limit | active-width | FactorMix ÷ active-width | transformers-eager | memory" in head
    assert "| × 1.50 | × 1.50 | × 0.90 | × 0.50 |" in decode
    assert "| – | 27 (26–28) |" in speed_table(bench("factormix")["runs"])[2]


def test_the_folder_holds_json_table_and_plot(tmp_path, monkeypatch):
    made = bench("dense", "factormix", "active-width")
    write_speed(tmp_path / "new" / "out", made, "factormix bench x")
    out = tmp_path / "new" / "out"
    assert json.loads((out / "bench.json").read_text()) == made
    text = (out / "bench.md").read_text()
    assert all(part in text for part in ("factormix bench x", "7 rounds", "two cores", "× 0.90", "(bench.png)"))
    assert "without a router" in text
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    (out / "bench.png").unlink()
    write_speed(out, bench("factormix"), "factormix bench x")  # alone: no ratio, no picture, nobody else explained
    assert (
        "bench.png" not in (out / "bench.md").read_text() and "without a router" not in (out / "bench.md").read_text()
    )
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_speed(out, made, "factormix bench x")
    assert not (out / "bench.png").exists() and "× 0.90" in (out / "bench.md").read_text()
