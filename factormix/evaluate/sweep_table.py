"""The result of a sweep: one row a cell, as CSV, Markdown and a plot of quality against the active fraction.

write_sweep(folder, varied=["layout", "tokens"], rows=rows)     # sweep.csv, sweep.md, sweep.png
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from factormix.evaluate import plots
from factormix.run.directory import atomic_path

Row = Mapping[str, Any]

MEASURES = (
    "active_fraction", "ratio_in_domain", "ratio_foreign", "ratio_all", "top1", "kl", "retention", "retention_low",
    "retention_high", "seconds", "peak_bytes", "parameters_per_token",
)  # fmt: skip
"""Columns after the keys that the grid varies; None where there is no such number."""


def sweep_row(values: Row, run: Row, evaluation: Row) -> dict[str, Any]:
    """A row of the table.

    Args:
        values: what the grid set in this cell.
        run: run.json of the factored model.
        evaluation: the JSON of ``factormix eval``.
    """
    ratios, kept = evaluation["mean_ratio"], (evaluation.get("retention") or {}).get("all")
    agreement = list(evaluation["agreement"].values())
    return {
        **values,
        "active_fraction": run["metrics"]["active_fraction"],
        "ratio_in_domain": ratios["in_domain"],
        "ratio_foreign": ratios["foreign"],
        "ratio_all": ratios["all"],
        "top1": _mean([entry["top1"] for entry in agreement]),
        "kl": _mean([entry["kl"] for entry in agreement]),
        "retention": kept and kept["retention"],
        "retention_low": kept and kept["interval"][0],
        "retention_high": kept and kept["interval"][1],
        "seconds": sum(phase["seconds"] for phase in run["phases"]),
        "peak_bytes": run["peak_memory_bytes"],
        "parameters_per_token": run["metrics"]["parameters_per_token"],
        **{f"ratio {stem}": entry["ratio"] for stem, entry in evaluation["perplexity"].items()},
    }


def write_sweep(folder: Path, varied: Sequence[str], rows: Sequence[Row]) -> None:
    """Write sweep.csv, sweep.md and, where matplotlib is installed, sweep.png into `folder`, replacing old ones.

    Args:
        folder: an existing directory.
        varied: the keys that the grid varies, which name a row.
        rows: of `sweep_row`, in the order to show.
    """
    columns = [*varied, *MEASURES, *dict.fromkeys(key for row in rows for key in row if key.startswith("ratio "))]
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _write(folder / "sweep.csv", table.getvalue())
    drawn = plots.draw_sweep(folder / "sweep.png", varied, rows)
    _write(folder / "sweep.md", _markdown(varied, rows, drawn))


def _markdown(varied: Sequence[str], rows: Sequence[Row], drawn: bool) -> str:
    shown: tuple[str, ...] = (
        "active_fraction",
        "ratio_in_domain",
        "ratio_foreign",
        "ratio_all",
        "top1",
        "retention",
        "seconds",
    )
    shown = tuple(key for key in shown if any(row.get(key) is not None for row in rows))
    head = [*varied, *(key.replace("_", " ") for key in shown)]
    lines = [
        "# Sweep",
        "",
        "Perplexity over that of the dense model (geometric means), share of equal top tokens, retained accuracy.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
    ]
    for row in rows:
        cells = [str(row.get(key, "")) for key in varied]
        cells += ["–" if row.get(key) is None else f"{row[key]:.4g}" for key in shown]
        lines.append("| " + " | ".join(cells) + " |")
    if drawn:
        lines += ["", "![Perplexity ratio against the active fraction](sweep.png)"]
    return "\n".join(lines) + "\n"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
