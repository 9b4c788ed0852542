"""Write the model card: README.md of an exported directory, with the YAML header that hubs read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import yaml  # type: ignore[import-untyped, unused-ignore]

from factormix.evaluate.markdown import table

UNKNOWN_LICENCE = "other"
PLACES = ("model", "out", "text", "heal_text", "task", "keep_experts_for", "against")
"""Options in run.json that are paths on the maker's machine. The card leaves them out."""


@dataclass(frozen=True)
class Origin:
    """Where a model comes from, for its card.

    Attributes:
        name: name of the exported model.
        base: name of the dense model, as it was given to `factor`.
        licence: licence of the dense model and so of the exported one: an SPDX name, or "other".
        run: run.json of the factored model; empty if there is none.
        results: JSON of `factormix eval --json` and `factormix bench --json`.
    """

    name: str
    base: str = ""
    licence: str = UNKNOWN_LICENCE
    run: Mapping[str, Any] = field(default_factory=dict)
    results: Sequence[Mapping[str, Any]] = ()


def card(origin: Origin, export: Mapping[str, Any]) -> str:
    """The text of README.md.

    Args:
        origin: where the model comes from.
        export: `Exported.to_dict()`.
    """
    header = {
        "license": origin.licence.lower(),
        **({"base_model": origin.base} if "/" in origin.base and not origin.base.startswith(("/", ".")) else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["factormix", "mixture-of-experts", "sparse", export["container"]],
    }
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {origin.name}",
        _what(origin, export),
        "## Serve it\n\n" + _serve(origin.name, export),
        "## How it was made\n\n" + _method(origin, export),
        "## Quality\n\n" + _quality(origin, export),
    ]
    if speed := _speed(origin.results):
        parts.append("## Speed\n\n" + speed)
    return "\n\n".join(parts) + "\n"


def _what(origin: Origin, export: Mapping[str, Any]) -> str:
    base = f"`{origin.base}`" if origin.base else "a dense model"
    terms = "see its model card" if origin.licence == UNKNOWN_LICENCE else origin.licence
    rows = {
        "base model": base,
        "licence": f"that of the base model ({terms})",
        "layout": f"{export['layout']}: {export['active']} of {export['routed']} experts of {export['width']} neurons "
        f"for a token, {export['shared']} neurons shared by all",
        "parameters": f"{export['parameters']:,}",
        "read for a token": f"{export['parameters_per_token']:,}",
        "container": f"{export['architecture']} ({export['dtype']})",
    }
    lines = [
        f"{base} with the feed-forward network of every layer cut into experts, of which only some run for a token. It "
        "was made by FactorMix and is stored as a stock architecture: no FactorMix and no remote code is needed.",
        _table([("", ""), *rows.items()]),
    ]
    if export["approximations"]:
        lines.append(f"**Not exact**: {'; '.join(export['approximations'])}.")
    return "\n\n".join(lines)


def _serve(name: str, export: Mapping[str, Any]) -> str:
    if export["gguf"]:
        return f'```\nllama-server -m {export["gguf"][0]}\nllama-cli -m {export["gguf"][0]} -p "Hello"\n```'
    low = "Load it in float32 or bfloat16: in float16 the router's weights are subnormal numbers."
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```\n\n'
        f"```\nvllm serve {name} --dtype bfloat16\n```\n\n"
        "llama.cpp: convert it with `convert_hf_to_gguf.py`, or export with `factormix export --to gguf`. "
        f'With FactorMix, `factormix.load("{name}")` gives the sparse model back.\n\n{low}'
    )


def _method(origin: Origin, export: Mapping[str, Any]) -> str:
    run, config = origin.run, origin.run.get("config", {})
    lines = []
    if config:
        known = {k: value for k, value in config.items() if k not in PLACES and not isinstance(value, dict | list)}
        lines.append(
            "It was made by FactorLLM (arXiv 2408.11855): neurons are assigned to experts by their activations on "
            "text. Experts and a linear router are fitted to the dense FFN's outputs, layer by layer."
        )
        lines.append(_table([("setting", "value"), *((k, str(v)) for k, v in known.items())]))
        lines.append(f"The calibration text has {run.get('tokens', 0):,} tokens.")
    if run.get("data"):
        hashes = [(PurePath(name).name, digest) for name, digest in run["data"].items()]
        lines.append(_table([("data", "SHA-256"), *hashes]))
    lines.append(f"Container: {export['reason']}")
    if export["m"] is not None:
        lines.append(
            "All experts that a token chose have the same weight. The container's router gives nearly equal weights "
            f"because its logits are small: its rows minus their mean, scaled to unit spread, times 2^-{export['m']}. "
            "These weights are divided out of the experts' down projections."
        )
    return "\n\n".join(lines)


def _quality(origin: Origin, export: Mapping[str, Any]) -> str:
    parity = export["parity"]
    rows = [
        ("exported model against FactorMix's", f"{parity['tokens']:,} tokens, float32, plain transformers"),
        ("relative error of the logits, experts forced", f"{parity['logit_error']:.2e}"),
        ("routing decisions that differ in the same state", f"{100 * parity['flips']:.4f} %"),
        ("those where the scores were no tie", f"{100 * parity['flips_beyond_ties']:.4f} %"),
        ("routing decisions that differ, experts free", f"{100 * parity['free_flips']:.4f} %"),
        ("same most likely next token", f"{100 * parity['top1']:.2f} %"),
        ("perplexity, FactorMix / exported", f"{parity['perplexity']:.4f} / {parity['exported_perplexity']:.4f}"),
    ]
    tables = [_table(rows)]
    metrics = {k: v for k, v in origin.run.get("metrics", {}).items() if isinstance(v, int | float)}
    if metrics:
        tables.append(_table([("from run.json", ""), *((k, f"{v:,.4g}") for k, v in metrics.items())]))
    for result in origin.results:
        scores = result.get("perplexity", {})
        lines = [(text, *(_number(score[key]) for key in ("base", "model", "ratio"))) for text, score in scores.items()]
        if lines:
            tables.append(_table([("perplexity", "dense", "this model", "ratio"), *lines]))
    return "\n\n".join(tables)


def _speed(results: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (f"{phase} {size}", *(_number(speed[key]) for key in ("base", "model", "ratio")))
        for result in results
        for phase in ("decode", "prefill")
        for size, speed in result.get(phase, {}).items()
    ]
    if not rows:
        return ""
    settings = next(result["settings"] for result in results if "settings" in result)
    where = f"{settings['machine']}, {settings['dtype']}, {settings['threads']} threads"
    return f"The speeds are those of FactorMix ({where}).\n\n" + _table(
        [("tokens/s", "dense", "this model", "ratio"), *rows]
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(table(rows[0], rows[1:]))
