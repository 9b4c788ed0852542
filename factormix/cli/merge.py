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
from factormix.cli.models import locate, open_model, open_tokenizer
from factormix.nn import FactorMixMixin
from factormix.run.directory import check_output, output_directory, sha256, write_json
from factormix.run.errors import FactorMixError
from factormix.run.record import RunRecord

SCHEMA_VERSION = 1


def merge(
    model: options.Model,
    adapter: options.Adapter = None,
    weight: Annotated[
        list[float] | None, typer.Option("--weight", help="fixed weight of each --adapter, in order; 1 by default")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="the directory to write")] = None,
    dtype: options.Dtype = "auto",
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
    json: options.Json = None,
) -> None:
    """Append the neurons of domain adapters to MODEL's FFNs, and write the wider model as MODEL's own kind."""
    if not adapter or out is None:
        raise FactorMixError("merge needs --adapter DIR and -o DIR.")
    weights = list(weight or [1.0] * len(adapter))
    if len(weights) != len(adapter):
        raise FactorMixError(f"{len(adapter)} adapters and {len(weights)} weights: give each --adapter one --weight.")
    check_output(out, overwrite)
    options.check_json(json)
    from factormix.mix.adapter_files import WEIGHTS, read_adapter_config
    from factormix.mix.merge import merge_adapters

    for folder in adapter:
        read_adapter_config(folder)
    source = locate(model, quiet)
    tokenizer, base = open_tokenizer(source), open_model(source, dtype)
    words = [word for pair in zip(adapter, weights) for word in ("--adapter", pair[0], "--weight", f"{pair[1]:g}")]
    hashes = {folder: sha256(Path(folder) / WEIGHTS) for folder in adapter}
    record = RunRecord(shlex.join(["factormix", "merge", model, *words, "-o", str(out)]), data=hashes, dtype=dtype)
    with record.phase("merge"):
        merged = merge_adapters(base, list(zip(adapter, weights)))
    record.metrics = asdict(merged)
    _save(base, tokenizer, out, overwrite, record.to_dict())
    options.put_json(json, {"schema_version": SCHEMA_VERSION, **asdict(merged)})
    typer.echo(f"{out}: {merged}")


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
