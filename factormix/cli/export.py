"""`factormix export`: a factored model as a stock architecture that plain transformers, vLLM and llama.cpp load."""

from __future__ import annotations

import json as js
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from factormix import checkpoint
from factormix.assets.table import ASSETS
from factormix.cli import options
from factormix.cli.eval import pack_text
from factormix.cli.models import (
    Source,
    check_compute,
    locate,
    locate_text,
    open_model,
    open_tokenizer,
    run_json,
    text_hashes,
)
from factormix.data.packing import fitting
from factormix.data.text import read_documents
from factormix.run.directory import check_output
from factormix.run.errors import FactorMixError
from factormix.run.progress import say
from factormix.run.record import RunRecord

SCHEMA_VERSION = 1
DEFAULT_TEXT = "asset:brown-heldout"
TARGETS = "auto, granite, mixtral, qwen2_moe, qwen3_moe, glm4_moe, flex_olmo or gguf"
WINDOW = 512


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a FactorMix directory")],
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="the directory to write")] = None,
    to: Annotated[str, typer.Option("--to", metavar="CONTAINER", help=TARGETS)] = "auto",
    quantization: Annotated[
        list[str] | None, typer.Option("--quantization", help="of --to gguf: f16 or q8_0; repeat for both [f16]")
    ] = None,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="change what no container holds exactly, and report the distance")
    ] = False,
    text: options.Text = None,
    tokens: Annotated[int, typer.Option("--tokens", help="tokens of text on which the two models are compared")] = 4096,
    dtype: options.Dtype = "auto",
    base: Annotated[str | None, typer.Option("--base", metavar="NAME", help="the dense model, for the card")] = None,
    licence: Annotated[str | None, typer.Option("--licence", help="of the dense model, for the card")] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option("--results", metavar="FILE", help="JSON of eval or bench, for the card; repeat for more"),
    ] = None,
    push: Annotated[str | None, typer.Option("--push", metavar="OWNER/NAME", help="upload it to the hub")] = None,
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
    json: options.Json = None,
) -> None:
    """Write MODEL as an architecture that other engines load, and prove on text that it computes the same."""
    if out is None:
        raise FactorMixError("export needs -o DIR: factormix export MODEL -o DIR.")
    from factormix.export import Origin, export_model
    from factormix.export.push import check_push, push_directory

    check_output(out, overwrite)
    options.check_json(json)
    check_compute(dtype, "cpu")
    if push is not None:
        check_push(push)
    scores = [_read_json(path) for path in results or ()]
    source = locate(model, quiet)
    _refuse_dense(source)
    paths = locate_text(text or [DEFAULT_TEXT], quiet)
    record = RunRecord(shlex.join(["factormix", "export", model, "--to", to, "-o", str(out)]), dtype=dtype)
    record.data = text_hashes(paths)
    tokenizer, opened = open_tokenizer(source), open_model(source, dtype)
    window = fitting(WINDOW, opened.config)
    packed = pack_text(read_documents(paths), tokenizer, window, -(-tokens // window) * window, quiet)
    run = run_json(source)
    named = base or str(run.get("config", {}).get("model", ""))
    origin = Origin(push or out.name, _base_name(named), licence or _licence(named), run, scores)
    exported = export_model(
        opened, out, packed, tokenizer, to, quantization or ("f16",), approximate, overwrite, origin, record, quiet
    )
    options.put_json(json, {"schema_version": SCHEMA_VERSION, **exported.to_dict()})
    typer.echo(_summary(str(out), exported.to_dict()))
    if push is not None:
        say(f"pushing {out} to {push}.", quiet)
        typer.echo(push_directory(out, push))


def _refuse_dense(source: Source) -> None:
    if source.hub or not checkpoint.is_factormix(source.path):
        raise FactorMixError(
            f"{source.typed!r} is no FactorMix directory; make one with `factormix factor`. Other engines load a dense "
            "model as it is."
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = js.loads(path.read_text(encoding="utf-8"))
        assert isinstance(found, dict)
    except (OSError, ValueError, AssertionError) as error:
        raise FactorMixError(
            f"--results {str(path)!r} is no JSON of eval or bench ({error}); write it with --json."
        ) from error
    return found


def _asset(name: str) -> str:
    return name.removeprefix("asset:") if name.startswith("asset:") else ""


def _base_name(name: str) -> str:
    """A card names no directory of the maker's."""
    asset = ASSETS.get(_asset(name))
    return asset.about.split(" (")[0] if asset else Path(name).name if Path(name).exists() else name


def _licence(name: str) -> str:
    asset = ASSETS.get(_asset(name))
    return asset.licence if asset else "other"


def _summary(out: str, export: Mapping[str, Any]) -> str:
    parity = export["parity"]
    lines: Sequence[str] = [
        f"{out}: {export['architecture']}, {export['parameters']:,} parameters, {export['parameters_per_token']:,} of "
        "them read for a token",
        str(export["reason"]),
        f"over {parity['tokens']:,} tokens: logits differ by {parity['logit_error']:.1e} with the same experts, "
        f"{100 * parity['flips']:.3f} % of routing decisions differ, {100 * parity['top1']:.2f} % of most likely "
        f"tokens are equal, perplexity {parity['perplexity']:.3f} and exported {parity['exported_perplexity']:.3f}",
        *(f"approximated: {each}" for each in export["approximations"]),
    ]
    return "\n".join(lines)
