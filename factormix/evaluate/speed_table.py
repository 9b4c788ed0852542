"""Write measured speeds as a Markdown table with one row per setting, or as a folder of JSON, Markdown and a plot.

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
    "The table shows tokens per second: the median of the rounds, with quartiles in brackets. The models ran in turn. "
    "Ratios are to the dense model. The limit is the largest possible ratio. For decoding it follows from the bytes of "
    "a step: the weights, with only the experts that were chosen, and the key-value cache. For prefill it follows from "
    "the floating-point operations. Memory is that of the weights plus the most that a round held in addition."
)
WITH_COMPANIONS = (
    " Active-width is a dense model with as many neurons as run for a token, without a router. Transformers is the "
    "same sparse model with its experts run by transformers' own functions."
)


def speed_table(runs: Sequence[Row]) -> list[str]:
    """The lines of a Markdown table with one row per setting and columns for the implementations that were timed.

    Args:
        runs: dicts of `Run`, from ``Bench.to_dict()["runs"]``.
    """
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
    """Write bench.json and bench.md into `folder`, and bench.png if matplotlib is installed and there are ratios.

    Args:
        folder: the directory. It is created if needed, and files of these names are replaced.
        bench: ``Bench.to_dict()``.
        command: the command that was typed, so that a reader can repeat it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "bench.json", bench)
    settings, runs = bench["settings"], bench["runs"]
    drawn = plots.draw_bench(folder / "bench.png", bench)
    more = WITH_COMPANIONS if any(run["implementation"] in COMPANIONS for run in runs) else ""
    lines = [
        "# Speed",
        "",
        "```",
        command,
        "```",
        "",
        f"{EXPLAINED}{more} {settings['repeats']} rounds; {settings['machine']}, {settings['device']}, torch "
        f"{settings['torch']}.",
        "",
        *speed_table(runs),
        *(["", f"![{plots.CAPTIONS['speed']}](bench.png)"] if drawn else []),
    ]
    with atomic_path(folder / "bench.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def setting(phase: str, count: int) -> str:
    """A setting in words, such as "decode, batch 1"."""
    return f"{phase}, {count} tokens" if phase == "prefill" else f"{phase}, batch {count}"


def _spread(run: Row) -> str:
    if not run:
        return "–"
    quartiles = run.get("tokens_per_s_iqr")
    spread = f" ({number(quartiles[0])}–{number(quartiles[1])})" if quartiles else ""
    return number(run["tokens_per_s"]) + spread
