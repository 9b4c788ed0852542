"""Write the report folder: what a run did, what it cost and what it gained, readable without running anything.

write_report(folder, run=record.to_dict(), evaluation={"FactorMix": e.to_dict(), "paper preset": p.to_dict()},
             bench=b.to_dict(), sites=sites, answers=answers)

folder/report.md      the summary
folder/plots/*.png    quality, speed, and numbers for each FFN
folder/run.json       the record of the run
folder/results.json   all other data of the summary
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from factormix.evaluate import plots
from factormix.evaluate.markdown import number, size, table
from factormix.evaluate.speed_table import EXPLAINED, speed_table
from factormix.run.directory import write_json

SCHEMA_VERSION = 1
Row = Mapping[str, Any]


def write_report(
    folder: str | Path,
    run: Row,
    evaluation: Mapping[str, Any],
    bench: Row,
    sites: Sequence[Row] = (),
    answers: Sequence[Row] = (),
) -> Path:
    """Write the report into `folder`, and return the path of ``report.md``.

    Args:
        folder: the directory. It is created if needed, and files of the same names are replaced.
        run: RunRecord.to_dict(). The report shows its ``config`` unchanged.
        evaluation: ``{method: Evaluation.to_dict()}``, first the method that is reported, then those it is compared
            with ("paper preset", "static pruning"). It may also be one Evaluation.to_dict().
        bench: Bench.to_dict(), or {} if nothing was timed.
        sites: one row per FFN, ``{site, layer, recall, captured, error_before, error_after, load}``. recall is the
            label recall and captured the share of the routed output's norm, both 0 to 1. The errors are relative output
            errors before and after the layer fit. load is a list of R shares of tokens. Values may be None.
        answers: rows ``{prompt, base, model}``, or ``{prompt, answers: {name: text}}`` for more than two models.

    Raises:
        FactorMixError: matplotlib is not installed.
    """
    methods = {"FactorMix": evaluation} if "perplexity" in evaluation else dict(evaluation)
    folder = Path(folder)
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    drawn = plots.draw_all(folder / "plots", methods, bench, sites)
    parts = [
        "# FactorMix report",
        _what(run),
        _quality(methods, drawn),
        _speed(bench, drawn),
        _sites(sites, drawn),
        _answers(answers),
        _how(run),
    ]
    results = {
        "schema_version": SCHEMA_VERSION,
        "evaluation": methods,
        "bench": bench,
        "sites": list(sites),
        "answers": list(answers),
    }
    write_json(folder / "run.json", run)
    write_json(folder / "results.json", results)
    path = folder / "report.md"
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return path


def _what(run: Row) -> str:
    config = run.get("config") or {}
    facts = {
        "Command": run.get("command"),
        "Model": config.get("model"),
        "Layout": config.get("layout"),
        "Tokens seen": _count(run.get("tokens")),
        "Time": _duration(sum(phase["seconds"] for phase in run.get("phases") or []) or run.get("seconds")),
        "Peak memory": size(run.get("peak_memory_bytes") or run.get("peak_bytes")),
        "Machine": run.get("machine"),
        "Threads, dtype, seed": _joined(run.get(key) for key in ("threads", "dtype", "seed")),
    }
    lines = ["## What was done", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items() if value not in (None, "")]
    if run.get("phases"):
        rows = [[phase["name"], _duration(phase["seconds"])] for phase in run["phases"]]
        lines += ["", *table(["phase", "time"], rows)]
    return "\n".join(lines)


def _quality(methods: Mapping[str, Row], drawn: Mapping[str, str]) -> str:
    if not methods:
        return ""
    first = next(iter(methods.values()))
    foreign, inside = first.get("foreign") or [], first.get("in_domain") or []
    head = ["text", "tokens", "dense perplexity", *methods]
    rows = []
    for stem, entry in first["perplexity"].items():
        place = " (in-domain)" if stem in inside else " (foreign)" if inside and stem in foreign else ""
        cells = [_ratio_cell(scores.get("perplexity", {}).get(stem, {})) for scores in methods.values()]
        rows.append([stem + place, _count(entry["tokens"]), number(entry["base"]), *cells])
    means = {"all": "geometric mean", "in_domain": "geometric mean, in-domain", "foreign": "geometric mean, foreign"}
    for key, label in means.items():
        values = [(scores.get("mean_ratio") or {}).get(key) for scores in methods.values()]
        if any(value is not None for value in values) and (key == "all" or inside):
            rows.append([label, "", "", *(f"× {value:.3f}" if value is not None else "–" for value in values)])
    lines = [
        "## Quality",
        "",
        "The table shows the perplexity of each method and, in brackets, its ratio to the dense model ± standard error "
        "(bootstrap over windows). A ratio of 1 means no loss; lower is better.",
        "",
        *table(head, rows),
    ]
    agreement = [
        [name, stem, f"{100 * entry['top1']:.1f} %", f"{entry['kl']:.3f}"]
        for name, scores in methods.items()
        for stem, entry in (scores.get("agreement") or {}).items()
        if entry.get("top1") is not None
    ]
    if agreement:
        lines += ["", "Each method agrees with the dense model, token by token, as follows:", ""]
        lines += table(["method", "text", "same top token", "KL(dense || method), nats"], agreement)
    return "\n".join([*lines, *_tasks(methods), *_picture(drawn, "perplexity")])


def _tasks(methods: Mapping[str, Row]) -> list[str]:
    """Accuracy by task, and the retention pooled over informative tasks. Empty if no task was run."""
    first = next(iter(methods.values())).get("tasks") or {}
    if not first:
        return []
    rows = []
    for name, entry in first.items():
        cells = [_accuracy((scores.get("tasks") or {}).get(name, {}), "model", "stderr") for scores in methods.values()]
        note = "" if entry.get("informative") is not False else " (not informative)"
        rows.append(
            [name + note, str(entry["n"]), f"{entry['chance']:.2f}", _accuracy(entry, "base", "base_stderr"), *cells]
        )
    for key, label in (("all", "retention"), ("choice", "retention, choice"), ("last_word", "retention, last words")):
        kept = [(scores.get("retention") or {}).get(key) for scores in methods.values()]
        if any(kept):
            rows.append([label, "", "", "", *(_retained(entry) for entry in kept)])
    return [
        "",
        "The table shows accuracy ± standard error. Retention is the summed accuracy divided by that of the dense "
        "model, with its 95 % interval (paired bootstrap). It counts the tasks where the dense model is at least 5 "
        "standard errors above chance.",
        "",
        *table(["task", "questions", "chance", "dense", *methods], rows),
    ]


def _accuracy(entry: Row, who: str, error: str) -> str:
    return "–" if entry.get(who) is None else f"{entry[who]:.3f} ± {entry[error]:.3f}"


def _retained(entry: Row | None) -> str:
    if entry is None:
        return "–"
    low, high = entry["interval"]
    return f"{100 * entry['retention']:.1f} % ({100 * low:.1f}–{100 * high:.1f})"


def _ratio_cell(entry: Row) -> str:
    if entry.get("model") is None:
        return "–"
    if entry.get("ratio") is None:
        return number(entry["model"])
    error = "" if entry.get("ratio_stderr") is None else f" ± {entry['ratio_stderr']:.3f}"
    return f"{number(entry['model'])} (× {entry['ratio']:.3f}{error})"


def _speed(bench: Row, drawn: Mapping[str, str]) -> str:
    runs = list(bench.get("runs") or [])
    if not runs:
        return ""
    return "\n".join(["## Speed", "", EXPLAINED, "", *speed_table(runs), *_picture(drawn, "speed")])


def _sites(sites: Sequence[Row], drawn: Mapping[str, str]) -> str:
    if not sites:
        return ""
    names = {
        "recall": "label recall",
        "captured": "captured norm",
        "error_before": "error before layer fit",
        "error_after": "error after layer fit",
    }
    rows = []
    for key, label in names.items():
        values = [row[key] for row in sites if row.get(key) is not None]
        if values:
            rows.append([label, *(f"{value:.3f}" for value in (sum(values) / len(values), min(values), max(values)))])
    lines = [
        f"## The {len(sites)} FFNs",
        "",
        "Label recall is the share of the experts that a router should have chosen and did choose. Captured norm is "
        "the share of the routed output's norm that the chosen experts hold. Error is the norm of the difference from "
        "the dense output, divided by the norm of the dense output.",
        "",
        *table(["", "mean", "lowest", "highest"], rows),
    ]
    return "\n".join([*lines, *_picture(drawn, "sites"), *_picture(drawn, "load")])


def _answers(answers: Sequence[Row]) -> str:
    if not answers:
        return ""
    lines = ["## Answers", "", "The answers are decoded greedily and not edited."]
    for row in answers:
        by_model = row.get("answers") or {"dense": row.get("base"), "FactorMix": row.get("model")}
        lines += ["", "**Prompt**", "", *_verbatim(row["prompt"])]
        for name, text in by_model.items():
            if text is not None:
                lines += ["", f"**{name}**", "", *_verbatim(text)]
    return "\n".join(lines)


def _how(run: Row) -> str:
    lines: list[str] = []
    config = dict(_flat(run.get("config") or {}))
    if config:
        lines += [
            "## Configuration",
            "",
            *table(["option", "value"], [[f"`{k}`", f"`{v}`"] for k, v in config.items()]),
        ]
    if run.get("data"):
        rows = [[name, f"`{digest}`"] for name, digest in run["data"].items()]
        lines += ["", "The run read these texts:", "", *table(["text", "SHA-256"], rows)]
    if run.get("versions"):
        lines += ["", "Versions: " + ", ".join(f"{name} {version}" for name, version in run["versions"].items()) + "."]
    return "\n".join(lines).strip()


def _flat(values: Row, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _picture(drawn: Mapping[str, str], name: str) -> list[str]:
    return ["", f"![{plots.CAPTIONS[name]}](plots/{drawn[name]})"] if name in drawn else []


def _verbatim(text: str) -> list[str]:
    """A code block whose fence is longer than any in the text, so that no part of the text is read as Markdown."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}text", text, fence]


def _count(value: int | None) -> str:
    return f"{value:,}" if value else ""


def _duration(seconds: float | None) -> str:
    if not seconds:
        return ""
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _joined(values: Iterable[Any]) -> str:
    return ", ".join(str(value) for value in values if value is not None)
