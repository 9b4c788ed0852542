"""`factormix bench`: tokens a second of a model and its dense base, turn by turn in one process."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel

from factormix.cli import options
from factormix.cli.models import locate, locate_text, open_adapted, open_model, open_tokenizer
from factormix.data.text import read_documents
from factormix.evaluate.companions import COMPANIONS
from factormix.evaluate.shapes import SHAPES, random_models
from factormix.evaluate.speed import DTYPES, Bench
from factormix.evaluate.speed import bench as measure
from factormix.evaluate.speed_table import write_speed
from factormix.nn import Layout, check_quantize
from factormix.nn import quantize as quantize_ffns
from factormix.run.errors import FactorMixError, choose
from factormix.run.progress import say

DEFAULT_LAYOUT = "S4A4E16"  # of a --shape
TEXT_CHARACTERS = 50_000  # of --text, tokenised for prompts


def bench(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help=options.MODEL_HELP)] = None,
    against: options.Against = None,
    adapter: options.Adapter = None,
    gate: options.Gate = None,
    mix: options.Mix = None,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape", metavar="|".join(SHAPES), help="instead of MODEL: a dense and a sparse one of random weights"
        ),
    ] = None,
    layout: Annotated[str | None, typer.Option("--layout", help=f"of the sparse --shape [{DEFAULT_LAYOUT}]")] = None,
    batch: Annotated[list[int] | None, typer.Option("--batch", help="decode batch; repeat for more [1]")] = None,
    prefill: Annotated[list[int] | None, typer.Option("--prefill", help="prompt length; repeat for more [512]")] = None,
    decode: Annotated[bool, typer.Option("--decode/--no-decode", help="time decoding; encoders cannot")] = True,
    no_prefill: Annotated[bool, typer.Option("--no-prefill", help="do not time prefill")] = False,
    generate: Annotated[
        list[int] | None, typer.Option("--generate", metavar="BATCH", help="also time generate(); repeat for more")
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option("--beside", metavar="|".join(COMPANIONS), help="what else takes turns; repeat for more"),
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile", help="decode by torch.compile with a static cache, all models; compiling takes minutes"
        ),
    ] = False,
    dtype: Annotated[list[str] | None, typer.Option("--dtype", help="repeat for more [float32]")] = None,
    quantize: Annotated[
        str | None,
        typer.Option("--quantize", metavar="int8", help="int8 weights in the FFNs of both models"),
    ] = None,
    threads: Annotated[list[int] | None, typer.Option("--threads", help="CPU threads; repeat for more [1]")] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="tokens decoded a round")] = 32,
    repeats: Annotated[int, typer.Option("--repeats", help="timed rounds")] = 5,
    text: options.Text = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    quiet: options.Quiet = False,
    json: options.Json = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="write bench.json, bench.md and bench.png there")
    ] = None,
) -> None:
    """Tokens a second of MODEL and, with --against, of the dense model in turn; medians of several rounds."""
    options.check_json(json)
    dtypes = dtype or ["float32"]
    for name in dtypes:
        choose("dtype", name, DTYPES)
    for name in beside or ():
        choose("--beside", name, COMPANIONS)
    check_quantize(quantize)
    if quantize and beside:
        raise FactorMixError(f"--beside {beside[0]} shares the models' weights as they are: leave --quantize out.")
    dense: PreTrainedModel | None = None
    ids: Tensor | None = None
    if shape is not None:
        _refuse_beside_shape(shape, (model, against, adapter, gate, mix, text))
        dense, sparse = random_models(shape, Layout.parse(layout or DEFAULT_LAYOUT), DTYPES[dtypes[0]], seed)
        dense, sparse = dense.to(device), sparse.to(device)  # type: ignore[arg-type]
        if quantize:
            dense, sparse = quantize_ffns(dense), quantize_ffns(sparse)
    elif model is None or layout is not None:
        given = "no MODEL" if model is None else f"--layout {layout} beside {model!r}, which has its own"
        raise FactorMixError(f"bench received {given}. Name a MODEL, or --shape {' or '.join(SHAPES)}.")
    else:
        source, base_source = locate(model, quiet), None if against is None else locate(against, quiet)
        if text:
            texts = "\n".join(read_documents([str(path) for path in locate_text(text, quiet)]).texts)[:TEXT_CHARACTERS]
            ids = torch.tensor(open_tokenizer(source)(texts, add_special_tokens=False)["input_ids"])
        sparse = open_adapted(source, adapter or (), gate, mix, dtypes[0], device, quantize=quantize)
        dense = None if base_source is None else open_model(base_source, dtypes[0], device, quantize=quantize)
    batches, generated = tuple(batch or (1,)) if decode else (), tuple(generate or ())
    if (batches or generated) and not sparse.can_generate():
        say(f"{type(sparse).__name__} does not decode: prefill only.", quiet)
        batches, generated = (), ()
    lengths = () if no_prefill else tuple(prefill or (512,))
    _refuse_too_long(sparse.config, max(lengths, default=0))
    result = measure(
        sparse, dense, decode_batches=batches, prefill_tokens=lengths, generate_batches=generated, dtypes=dtypes,
        threads=threads or (1,), beside=beside or (), compiled=compiled, new_tokens=new_tokens, repeats=repeats,
        text=ids, seed=seed, quiet=quiet,
    )  # fmt: skip
    result.settings.update({"model": model or f"{shape} {layout or DEFAULT_LAYOUT}", "quantize": quantize})
    options.put_json(json, result.to_dict())
    if out is not None:
        write_speed(out, result.to_dict(), shlex.join(["factormix", *sys.argv[1:]]))
    typer.echo(_table(result))


def _refuse_beside_shape(shape: str, others: tuple[object, ...]) -> None:
    if any(others):
        raise FactorMixError(f"--shape {shape} times random weights: leave MODEL, its options and --text out.")


def _refuse_too_long(config: object, length: int) -> None:
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit:
        raise FactorMixError(
            f"--prefill received {length}; this model has {limit} positions, allowed: at most {limit}."
        )


def _table(result: Bench) -> str:
    rows = [("phase", "size", "dtype", "threads", "model", "tokens/s", "quartiles", "ratio", "limit", "memory, MiB")]
    for run in result.runs:
        low, high = run.tokens_per_s_iqr
        ratio, limit = ("-" if v is None else f"{v:.3f}" for v in (run.ratio, run.limit))
        rows.append((
            run.phase, str(run.size), run.dtype, str(run.threads), run.implementation, f"{run.tokens_per_s:.1f}",
            f"{low:.1f} to {high:.1f}", ratio, limit, f"{run.peak_bytes / 2**20:.0f}",
        ))  # fmt: skip
    settings = result.settings
    return "\n".join([*options.aligned(rows), f"{settings['machine']}, torch {settings['torch']}"])
