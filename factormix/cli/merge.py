"""`factormix merge`: adapters under fixed weights become neurons of the FFNs; a plain checkpoint comes out."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factormix import checkpoint
from factormix.cli import options
from factormix.cli.models import by_name, locate, open_model, open_tokenizer
from factormix.nn import FactorMixMixin
from factormix.run.directory import check_output, output_directory, sha256, write_json
from factormix.run.errors import FactorMixError, choose
from factormix.run.record import RunRecord

SCHEMA_VERSION = 1
FORMS = ("qwen2_moe",)  # of --to


def merge(
    model: options.Model,
    adapter: options.Adapter = None,
    weight: Annotated[
        list[float] | None, typer.Option("--weight", help="fixed weight of each --adapter, in order; 1 by default")
    ] = None,
    gate: options.Gate = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="|".join(FORMS), help="another model class: one gated domain as a Qwen2-MoE"),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="the directory to write")] = None,
    dtype: options.Dtype = "auto",
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
    json: options.Json = None,
) -> None:
    """Append the neurons of domain adapters to MODEL's FFNs, and write the wider model as MODEL's own kind.

    With --gate and --to qwen2_moe, one domain stays gated: it becomes the shared expert of a plain Qwen2-MoE model.
    """
    if not adapter or out is None:
        raise FactorMixError("merge needs --adapter DIR and -o DIR.")
    _check_form(to, gate, weight)
    weights = list(weight or [1.0] * len(adapter))
    if len(weights) != len(adapter):
        raise FactorMixError(f"{len(adapter)} adapters and {len(weights)} weights: give each --adapter one --weight.")
    check_output(out, overwrite)
    options.check_json(json)
    from factormix.mix.adapter_files import WEIGHTS, read_adapter_config
    from factormix.mix.merge import merge_adapters
    from factormix.mix.qwen2_moe import to_qwen2_moe

    for folder in adapter:
        read_adapter_config(folder)
    source = locate(model, quiet)
    tokenizer, base = open_tokenizer(source), open_model(source, dtype)
    words = [word for pair in zip(adapter, weights) for word in ("--adapter", pair[0], "--weight", f"{pair[1]:g}")]
    words += ["--gate", str(gate), "--to", str(to)] if gate is not None else []
    hashes = {folder: sha256(Path(folder) / WEIGHTS) for folder in adapter}
    record = RunRecord(shlex.join(["factormix", "merge", model, *words, "-o", str(out)]), data=hashes, dtype=dtype)
    with record.phase("merge"):
        if gate is not None:
            base, merged = to_qwen2_moe(base, by_name("--adapter", adapter), gate)
        else:
            merged = merge_adapters(base, list(zip(adapter, weights)))
    record.metrics = asdict(merged)
    _save(base, tokenizer, out, overwrite, record.to_dict())
    options.put_json(json, {"schema_version": SCHEMA_VERSION, **asdict(merged)})
    typer.echo(f"{out}: {merged}")


def _check_form(to: str | None, gate: Path | None, weight: list[float] | None) -> None:
    if to is not None:
        choose("--to", to, FORMS)
    if gate is not None and to is None:
        raise FactorMixError(
            f"--gate {str(gate)!r}: a gated domain does not merge exactly, as its weight differs from token to token. "
            "Use --to qwen2_moe, or leave the gate out."
        )
    if to is not None and gate is None:
        raise FactorMixError(f"--to {to} needs --gate: the gate/ of a stage-2 directory, or own.")
    if gate is not None and weight:
        raise FactorMixError(f"--weight {weight} beside --gate: the gate decides the weight. Give one.")


def _save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, overwrite: bool, run: dict[str, Any]
) -> None:
    if isinstance(model, FactorMixMixin):
        checkpoint.save(model, out, tokenizer, overwrite, run=run)
        return
    with output_directory(out, overwrite) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / "run.json", run)
