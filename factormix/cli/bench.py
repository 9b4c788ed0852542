"""`factormix bench`: tokens a second of a model and its dense base, turn by turn in one process."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from factormix.cli import options
from factormix.cli.models import locate, locate_text, open_adapted, open_model, open_tokenizer
from factormix.data.text import read_documents
from factormix.evaluate.speed import DTYPES, Bench
from factormix.evaluate.speed import bench as measure
from factormix.run.errors import FactorMixError, choose
from factormix.run.progress import say

TEXT_CHARACTERS = 50_000  # of --text, tokenised for prompts


def bench(
    model: options.Model,
    against: options.Against = None,
    adapter: options.Adapter = None,
    gate: options.Gate = None,
    mix: options.Mix = None,
    batch: Annotated[list[int] | None, typer.Option("--batch", help="decode batch; repeat for more [1]")] = None,
    prefill: Annotated[list[int] | None, typer.Option("--prefill", help="prompt length; repeat for more [512]")] = None,
    decode: Annotated[bool, typer.Option("--decode/--no-decode", help="time decoding; encoders cannot")] = True,
    dtype: Annotated[list[str] | None, typer.Option("--dtype", help="repeat for more [float32]")] = None,
    threads: Annotated[list[int] | None, typer.Option("--threads", help="CPU threads; repeat for more [1]")] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="tokens decoded a round")] = 32,
    repeats: Annotated[int, typer.Option("--repeats", help="timed rounds")] = 5,
    text: options.Text = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    quiet: options.Quiet = False,
    json: options.Json = None,
) -> None:
    """Tokens a second of MODEL and, with --against, of the dense model in turn; medians of several rounds."""
    options.check_json(json)
    dtypes = dtype or ["float32"]
    for name in dtypes:
        choose("dtype", name, DTYPES)
    source, base_source = locate(model, quiet), None if against is None else locate(against, quiet)
    ids = None
    if text:
        texts = "\n".join(read_documents([str(path) for path in locate_text(text, quiet)]).texts)[:TEXT_CHARACTERS]
        ids = torch.tensor(open_tokenizer(source)(texts, add_special_tokens=False)["input_ids"])
    sparse = open_adapted(source, adapter or (), gate, mix, dtypes[0], device)
    dense = None if base_source is None else open_model(base_source, dtypes[0], device)
    batches = tuple(batch or (1,)) if decode else ()
    if batches and not sparse.can_generate():
        say(f"{type(sparse).__name__} does not decode: prefill only.", quiet)
        batches = ()
    lengths = tuple(prefill or (512,))
    _refuse_too_long(sparse.config, max(lengths))
    result = measure(
        sparse, dense, decode_batches=batches, prefill_tokens=lengths, dtypes=dtypes, threads=threads or (1,),
        new_tokens=new_tokens, repeats=repeats, text=ids, seed=seed, quiet=quiet,
    )  # fmt: skip
    options.put_json(json, result.to_dict())
    typer.echo(_table(result))


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
