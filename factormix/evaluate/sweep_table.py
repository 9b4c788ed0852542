"""Write the result of a sweep as CSV, Markdown and a plot, with one row per cell of the grid.

write_sweep(folder, varied=["layout", "tokens"], rows=rows)     # sweep.csv, sweep.md, sweep.png
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from factormix.evaluate import plots
from factormix.evaluate.markdown import table
from factormix.run.directory import atomic_path

Row = Mapping[str, Any]

MEASURES = (
    "active_fraction",
    "ratio_in_domain",
    "ratio_foreign",
    "ratio_all",
    "top1",
    "kl",
    "retention",
    "retention_low",
    "retention_high",
    "seconds",
    "peak_bytes",
    "parameters_per_token",
)
"""The columns after the keys that the grid varies. A value is None if the cell has no such number."""


def sweep_row(values: Row, run: Row, evaluation: Row) -> dict[str, Any]:
    """One row of the table.

    Args:
        values: the values that the grid set in this cell.
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
    """Write sweep.csv and sweep.md into `folder`, and sweep.png if matplotlib is installed. Old files are replaced.

    Args:
        folder: an existing directory.
        varied: the keys that the grid varies; their values name a row.
        rows: rows of `sweep_row`, in the order to show.
    """
    columns = [*varied, *MEASURES, *dict.fromkeys(key for row in rows for key in row if key.startswith("ratio "))]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _write(folder / "sweep.csv", text.getvalue())
    drawn = plots.draw_sweep(folder / "sweep.png", varied, rows)
    _write(folder / "sweep.md", _markdown(varied, rows, drawn))


def _markdown(varied: Sequence[str], rows: Sequence[Row], drawn: bool) -> str:
    measures = ("active_fraction", "ratio_in_domain", "ratio_foreign", "ratio_all", "top1", "retention", "seconds")
    shown = [key for key in measures if any(row.get(key) is not None for row in rows)]
    head = [*varied, *(key.replace("_", " ") for key in shown)]
    cells = [
        [str(row.get(key, "")) for key in varied]
        + ["–" if row.get(key) is None else f"{row[key]:.4g}" for key in shown]
        for row in rows
    ]
    explained = (
        "Ratios are perplexities divided by those of the dense model (geometric means). top1 is the share of tokens "
        "with the same most likely token as the dense model. Retention is the share of its accuracy that is kept."
    )
    lines = ["# Sweep", "", explained, "", *table(head, cells)]
    if drawn:
        lines += ["", "![Perplexity ratio against the active fraction](sweep.png)"]
    return "\n".join(lines) + "\n"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
