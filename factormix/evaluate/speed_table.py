"""Measured speeds for a reader: a Markdown table with a row a setting, and a folder of JSON, Markdown and a plot.

lines = speed_table(result["runs"])          # the runs of one `Bench.to_dict()`, or of several
write_speed(folder, result, command)         # bench.json, bench.md, bench.png
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from factormix.evaluate import plots
from factormix.evaluate.companions import COMPANIONS
from factormix.evaluate.markdown import number, size, table, times
from factormix.run.directory import atomic_path, write_json

Row = Mapping[str, Any]

EXPLAINED = (
    "Tokens a second, medians of the rounds, the models in turn; quartiles in brackets. Ratios are to dense. Limit: "
    "the ratio that the bytes of a step (decode: weights with the experts that were really chosen, key-value cache) or "
    "the floating-point operations (prefill) allow. Memory: weights, and the most that a round held beyond them."
)
WITH_COMPANIONS = (
    " Active-width: a dense model with as many neurons as run for a token, without router. Transformers: the same "
    "sparse model with its experts run by transformers' own functions."
)


def speed_table(runs: Sequence[Row]) -> list[str]:
    """Lines of a Markdown table of `Run`s as dicts: a row a setting, columns for the implementations there are."""
    grouped: dict[tuple[Any, ...], dict[str, Row]] = {}
    for run in runs:
        key = tuple(run[name] for name in ("phase", "size", "dtype", "threads"))
        grouped.setdefault(key, {})[run["implementation"]] = run
    beside = [name for name in COMPANIONS if any(name in by_name for by_name in grouped.values())]
    head = ["phase", "dtype", "threads", "dense", "FactorMix", "ratio", "limit"]
    for name in beside:
        head += [name] if name.startswith("transformers") else [name, f"FactorMix ÷ {name}"]
    rows = []
    for (phase, count, dtype, threads), by_name in grouped.items():
        dense, sparse = by_name.get("dense", {}), by_name.get("factormix", {})
        row = [setting(phase, count), dtype, str(threads), _spread(dense), _spread(sparse)]
        row += [times(sparse.get("ratio")), times(sparse.get("limit"))]
        for name in beside:
            other = by_name.get(name, {})
            row.append(times(other.get("ratio")))
            if not name.startswith("transformers"):
                row.append(times(sparse["tokens_per_s"] / other["tokens_per_s"]) if sparse and other else "–")
        rows.append([*row, f"{size(dense.get('peak_bytes')) or '–'} / {size(sparse.get('peak_bytes')) or '–'}"])
    return table([*head, "memory, dense / FactorMix"], rows)


def write_speed(folder: Path, bench: Row, command: str) -> None:
    """Write bench.json, bench.md and, where matplotlib is installed and there are ratios, bench.png into `folder`.

    The folder is made; old files of these names are replaced.

    Args:
        folder: the directory.
        bench: ``Bench.to_dict()``.
        command: what was typed, for the reader who wants it again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "bench.json", bench)
    settings, runs = bench["settings"], bench["runs"]
    drawn = plots.draw_bench(folder / "bench.png", bench)
    more = WITH_COMPANIONS if any(run["implementation"] in COMPANIONS for run in runs) else ""
    lines = [
        "# Speed", "", "```", command, "```", "",
        f"{EXPLAINED}{more} {settings['repeats']} rounds; {settings['machine']}, {settings['device']}, torch "
        f"{settings['torch']}.",
        "", *speed_table(runs), *(["", f"![{plots.CAPTIONS['speed']}](bench.png)"] if drawn else []),
    ]  # fmt: skip
    with atomic_path(folder / "bench.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def setting(phase: str, count: int) -> str:
    """What was timed, in words."""
    return f"{phase}, {count} tokens" if phase == "prefill" else f"{phase}, batch {count}"


def _spread(run: Row) -> str:
    if not run:
        return "–"
    quartiles = run.get("tokens_per_s_iqr")
    spread = f" ({number(quartiles[0])}–{number(quartiles[1])})" if quartiles else ""
    return number(run["tokens_per_s"]) + spread
