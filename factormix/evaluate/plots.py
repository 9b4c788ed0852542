"""Draw the pictures of reports with matplotlib (extra ``factormix[plot]``), which is imported only when needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from factormix.run.errors import FactorMixError

Row = Mapping[str, Any]

# Okabe and Ito's colours, which colour-blind readers can tell apart, also in print without colour
BLUE, ORANGE, GREEN, PURPLE, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
METHOD_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
GREY = "#888888"
PHASES = {"decode": BLUE, "generate": GREEN, "prefill": ORANGE}
COMPANION_MARKS = {"active-width": "D", "transformers-grouped_mm": "s", "transformers-eager": "v"}
STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 160,
    "font.size": 11,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": "#dddddd",
    "legend.frameon": False,
}
_ROUND = [digit * 10.0**power for power in range(-2, 9) for digit in (1, 2, 5)]  # ticks of a logarithmic axis

CAPTIONS = {
    "perplexity": "Perplexity ratio to the dense model by text and method",
    "speed": "Measured speed ratio to the dense model and its limit",
    "sites": "Label recall and captured norm by FFN",
    "load": "Load of each routed expert by FFN",
}


def draw_all(folder: str | Path, methods: Mapping[str, Row], bench: Row, sites: Sequence[Row]) -> dict[str, str]:
    """Draw every picture that there are data for.

    Args:
        folder: an existing directory, where the pictures are written.
        methods: ``{method: Evaluation.to_dict()}``.
        bench: Bench.to_dict(), or {}.
        sites: rows as `factormix.evaluate.report.write_report` takes them.

    Returns:
        ``{picture: file name}``.
    """
    jobs: dict[str, tuple[Callable[..., Any], Any]] = {}
    texts = [entry for scores in methods.values() for entry in scores["perplexity"].values()]
    if any(entry.get("ratio") is not None for entry in texts):
        jobs["perplexity"] = (draw_perplexity, methods)
    if any(run.get("ratio") is not None for run in bench.get("runs") or []):
        jobs["speed"] = (draw_speed, bench)
    if any(row.get(key) is not None for row in sites for key in ("recall", "captured")):
        jobs["sites"] = (draw_sites, sites)
    if any(row.get("load") for row in sites):
        jobs["load"] = (draw_load, sites)
    if jobs:
        with _matplotlib().rc_context(STYLE):
            for name, (draw, data) in jobs.items():
                draw(data).savefig(Path(folder) / f"{name}.png", bbox_inches="tight", facecolor="white")
    return {name: f"{name}.png" for name in jobs}


def draw_perplexity(methods: Mapping[str, Row]) -> Any:
    """Draw the ratio of perplexities to the dense model: a group for each text, a bar for each method."""
    stems = list(next(iter(methods.values()))["perplexity"])
    inside = next(iter(methods.values())).get("in_domain") or []
    figure, axes = _figure(max(6.4, 1.2 + 0.55 * len(stems) * (len(methods) + 1)), 4.2)
    width = 0.8 / len(methods)
    highest, lowest = 1.0, 1.0
    texts = [entry for scores in methods.values() for entry in scores["perplexity"].values()]
    ratios = [entry["ratio"] for entry in texts if entry.get("ratio") is not None]
    logarithmic = max(ratios) > 12  # on a linear axis, a collapsed baseline would flatten the other bars
    for index, (name, scores) in enumerate(methods.items()):
        entries = [(group, scores["perplexity"].get(stem, {})) for group, stem in enumerate(stems)]
        known = [(at, e["ratio"], e.get("ratio_stderr") or 0.0) for at, e in entries if e.get("ratio") is not None]
        places = [group + (index - (len(methods) - 1) / 2) * width for group, _, _ in known]
        heights = [ratio for _, ratio, _ in known]
        errors = [error for _, _, error in known]
        colour = METHOD_COLOURS[index % len(METHOD_COLOURS)]
        base = 1.0 if logarithmic else 0.0
        axes.bar(
            places,
            [h - base for h in heights],
            0.92 * width,
            bottom=base,
            yerr=errors,
            color=colour,
            label=name,
            error_kw={"ecolor": "#333333", "elinewidth": 1.2, "capsize": 3},
        )
        for place, height, error in zip(places, heights, errors, strict=True):
            text = f"{height:.2f}" if height < 99.5 else f"{height:.3g}"
            axes.annotate(text, (place, height + error), (0, 3), textcoords="offset points", ha="center", fontsize=9)
        highest = max([highest, *(h + e for h, e in zip(heights, errors, strict=True))])
        lowest = min([lowest, *heights])
    axes.axhline(1.0, color=GREY, linewidth=1.2, linestyle="--", zorder=1)
    style: Row = {"textcoords": "offset points", "va": "center", "color": "#555555", "fontsize": 9.5}
    axes.annotate("dense", (1.0, 1.0), (4, 0), xycoords=axes.get_yaxis_transform(), **style)
    if logarithmic:
        axes.set_yscale("log")
        axes.set_ylim(0.9 * lowest, highest * 1.6)
        axes.set_yticks([t for t in _ROUND if 0.9 * lowest <= t <= highest * 1.6], minor=False)
        axes.set_yticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:,g}")
    else:
        axes.set_ylim(0, highest * 1.14)
    axes.set_xticks(range(len(stems)), [f"{s}\n(in-domain)" if s in inside else s for s in stems])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("perplexity ÷ dense perplexity" + (" (log scale)" if logarithmic else ""))
    axes.set_title("Perplexity against the dense model (lower is better)")
    axes.grid(axis="y")
    if len(methods) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=min(4, len(methods)), handlelength=1.2)
    return figure


def draw_sweep(path: Path, varied: Sequence[str], rows: Sequence[Row]) -> bool:
    """Draw the ratio of perplexities against the active fraction, in-domain and foreign text side by side.

    There is a line for each setting of the grid's other keys.

    Args:
        path: the .png file to write.
        varied: the grid's keys.
        rows: rows of `factormix.evaluate.sweep_table.sweep_row`.

    Returns:
        False if nothing was drawn, because matplotlib is not installed or there are no ratios.
    """
    panels = [("ratio_in_domain", "in-domain text"), ("ratio_foreign", "foreign text"), ("ratio_all", "all texts")]
    known = [(key, title) for key, title in panels if any(row.get(key) is not None for row in rows)]
    panels = known if len(known) < len(panels) else known[:2]
    try:
        matplotlib = _matplotlib()
    except FactorMixError:
        return False
    if not panels:
        return False
    others = [key for key in varied if key != "layout"]
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(", ".join(f"{key} {row[key]}" for key in others) or "sweep", []).append(row)
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(1.5 + 4.6 * len(panels), 4.4))
        for axes, (key, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
            for index, (name, cells) in enumerate(lines.items()):
                points = sorted((row["active_fraction"], row[key]) for row in cells if row.get(key) is not None)
                style = {"color": METHOD_COLOURS[index % len(METHOD_COLOURS)], "marker": "os^Dv"[index // 6 % 5]}
                axes.plot(*zip(*points), label=name, linewidth=1.8, **style)
            axes.axhline(1.0, color=GREY, linewidth=1.2, linestyle="--")
            axes.set_yscale("log")
            bottom, top = axes.get_ylim()
            axes.set_yticks([t for t in (*_ROUND, 1.2, 1.5, 3.0) if bottom <= t <= top], minor=False)
            axes.set_yticks([], minor=True)
            axes.yaxis.set_major_formatter("{x:,g}")
            axes.set_xlabel("active fraction of the FFN")
            axes.set_ylabel("perplexity ÷ dense perplexity (log scale)")
            axes.set_title(title)
            axes.grid(axis="y")
        figure.tight_layout()
        if len(lines) > 1:
            handles, labels = axes.get_legend_handles_labels()
            figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(0.05, 0.0), ncols=2, fontsize=9)
        figure.savefig(path, bbox_inches="tight", facecolor="white")
    return True


def draw_bench(path: Path, bench: Row) -> bool:
    """Write `draw_speed` to a .png file. False if matplotlib is not installed or there are no ratios."""
    if not any(run.get("ratio") is not None and run["implementation"] == "factormix" for run in bench["runs"]):
        return False
    try:
        matplotlib = _matplotlib()
    except FactorMixError:
        return False
    with matplotlib.rc_context(STYLE):
        draw_speed(bench).savefig(path, bbox_inches="tight", facecolor="white")
    return True


def draw_speed(bench: Row) -> Any:
    """Draw the ratio of speeds to the dense model: a bar for each setting, a black line at its limit.

    Marks show the companions that were timed beside it.
    """
    timed = [run for run in bench["runs"] if run.get("ratio") is not None]
    runs = [run for run in timed if run["implementation"] == "factormix"]
    labels = [_setting(run) for run in runs]
    top = max(max(run["ratio"], run.get("limit") or 0.0) for run in timed if run["implementation"] != "dense")
    figure, axes = _figure(7.2, 1.7 + 0.55 * len(runs))
    axes.barh(range(len(runs)), [run["ratio"] for run in runs], 0.58, color=[PHASES[run["phase"]] for run in runs])
    for row, run in enumerate(runs):
        ratio, limit = run["ratio"], run.get("limit")
        colour = "#222222" if run["phase"] == "prefill" else "white"
        style: Row = {"textcoords": "offset points", "va": "center", "color": colour, "fontsize": 10}
        axes.annotate(f"× {ratio:.2f}", (0, row), (7, 0), fontweight="bold", **style)
        if limit is not None:
            axes.plot([limit] * 2, [row - 0.36, row + 0.36], color="#111111", linewidth=2.4, solid_capstyle="butt")
            style = {"textcoords": "offset points", "va": "center", "color": "#333333", "fontsize": 9}
            axes.annotate(f"limit {limit:.2f}", (limit, row), (6, 0), **style)
    for name, marker in COMPANION_MARKS.items():
        beside = {labels.index(_setting(run)): run["ratio"] for run in timed if run["implementation"] == name}
        if beside:
            axes.plot(list(beside.values()), list(beside), marker, color="#111111", markerfacecolor="white", label=name)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.9 / (1.7 + 0.55 * len(runs))), ncols=3, fontsize=9)
    axes.axvline(1.0, color=GREY, linewidth=1.2, linestyle="--")
    style = {"textcoords": "offset points", "ha": "center", "color": "#555555", "fontsize": 9.5}
    axes.annotate("dense", (1.0, 1.0), (0, 3), xycoords=axes.get_xaxis_transform(), **style)
    axes.set_yticks(range(len(runs)), labels)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, top * 1.18)
    axes.set_xlabel("tokens/s ÷ dense tokens/s")
    axes.set_title("Speed against the dense model (higher is better)", pad=22)
    axes.grid(axis="x")
    return figure


def draw_sites(sites: Sequence[Row]) -> Any:
    """Draw label recall and captured norm, 0 to 1, of every FFN over depth."""
    figure, axes = _figure(7.2, 3.8)
    series = (("captured", "captured norm", BLUE, "o"), ("recall", "label recall", ORANGE, "s"))
    for key, label, colour, marker in series:
        known = [(place, row[key]) for place, row in enumerate(sites) if row.get(key) is not None]
        if known:
            places, values = zip(*known, strict=True)
            axes.plot(places, values, color=colour, marker=marker, markersize=4.5, linewidth=1.8, label=label)
    axes.set_ylim(0, 1.02)
    axes.set_xlim(-0.5, len(sites) - 0.5)
    _layer_ticks(axes, sites)
    axes.set_ylabel("share (0 to 1)")
    axes.set_title("What the router finds and the chosen experts hold")
    axes.grid(axis="y")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.18), ncols=2)
    return figure


def draw_load(sites: Sequence[Row]) -> Any:
    """Draw the share of tokens that each expert of each FFN gets, as a heat map with the busiest experts on top."""
    rows = [row for row in sites if row.get("load")]
    routed = max(len(row["load"]) for row in rows)
    blank = [float("nan")]
    columns = [sorted(row["load"], reverse=True) + blank * (routed - len(row["load"])) for row in rows]
    grid = [[column[rank] for column in columns] for rank in range(routed)]  # R x sites
    figure, axes = _figure(max(5.0, 1.8 + 0.21 * len(rows)), 1.8 + 0.2 * routed)
    image = axes.imshow(grid, aspect="auto", cmap="cividis", vmin=0, interpolation="nearest")
    for side in axes.spines.values():
        side.set_visible(False)
    _layer_ticks(axes, rows)
    step = max(1, routed // 12)
    axes.set_yticks(range(0, routed, step), [str(rank + 1) for rank in range(0, routed, step)])
    axes.set_ylabel("expert, busiest first")
    axes.set_title("Load of the routed experts")
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.outline.set_visible(False)
    even = [sum(row["load"]) / len(row["load"]) for row in rows]
    label = "share of tokens"
    if max(even) - min(even) < 1e-3:  # K / R, the load of every expert if all are used alike
        bar.ax.axhline(even[0], color="white", linewidth=1.5)
        label += f" (white line: even, {even[0]:.2f})"
    bar.set_label(label)
    return figure


def _setting(run: Row) -> str:
    size = f"{run['size']} tokens" if run["phase"] == "prefill" else f"batch {run['size']}"
    threads = "1 thread" if run["threads"] == 1 else f"{run['threads']} threads"
    return f"{run['phase']}, {size}\n{run['dtype']}, {threads}"


def _layer_ticks(axes: Any, rows: Sequence[Row]) -> None:
    step = max(1, -(-len(rows) // 16))
    places = range(0, len(rows), step)
    axes.set_xticks(places, [str(rows[place].get("layer", place)) for place in places])
    axes.set_xlabel("layer of the FFN")


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of width x height inches, and its axes. It needs no display."""
    figure = _matplotlib().figure.Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise FactorMixError(
            "drawing the report's plots needs matplotlib, which is not installed. Run pip install 'factormix[plot]'."
        ) from error
    return matplotlib
