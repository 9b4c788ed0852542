"""`factormix sample`: chats or documents that a model writes by itself, to calibrate, heal or retain on."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from transformers import PreTrainedModel

from factormix.cli import options
from factormix.cli.models import check_compute, identity, locate, open_model, open_tokenizer, read_config, say_slow
from factormix.data.own_words import own_words
from factormix.run.directory import atomic_path, check_output_file
from factormix.run.errors import FactorMixError
from factormix.run.progress import bar
from factormix.run.workdir import WorkDirectory

FUTILE = 2  # after this batch, counted from 0, without a word there is no hope


def sample(
    model: options.Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="the .jsonl file to write")],
    tokens: Annotated[int, typer.Option("--tokens", help="how much to write, roughly: whole batches", min=1)] = 50_000,
    kind: Annotated[
        Literal["auto", "chat", "text"],
        typer.Option("--kind", help="chats, documents, or what the model has a template for"),
    ] = "auto",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="of an answer or a document", min=1)] = 256,
    batch: Annotated[int, typer.Option("--batch", help="texts written at once", min=1)] = 64,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "cpu",
    device_map: options.DeviceMap = None,
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
) -> None:
    """Let MODEL write text by itself, a .jsonl file: the questions and the answers, or documents.

    A run that was killed goes on where it stopped when the same command is given again (its work is in FILE.work).
    """
    if out.suffix != ".jsonl":
        raise FactorMixError(f"-o {str(out)!r}: the text is written as .jsonl; name a file that ends so.")
    check_output_file(out, overwrite)
    check_compute(dtype, device)
    source = locate(model, quiet)
    tokenizer = open_tokenizer(source)
    what: Literal["chat", "text"] = ("chat" if tokenizer.chat_template else "text") if kind == "auto" else kind
    known = {"model": identity(source, read_config(source)), "kind": what, "batch": batch, "seed": seed}
    work = WorkDirectory(f"{out}.work", {**known, "max_new_tokens": max_new_tokens, "dtype": dtype}, overwrite)
    rows: list[dict[str, Any]] = []
    opened: PreTrainedModel | None = None
    steps, shown = 0, bar("tokens written", tokens, quiet)

    def step() -> None:
        """Every pass of the model gives each text of the batch a token: a batch may take minutes."""
        nonlocal steps
        steps += 1
        shown.set_postfix_str(f"this batch: {steps} tokens a text", refresh=False)
        shown.update(0)

    def batch_of(number: int) -> list[dict[str, Any]]:
        nonlocal opened, steps
        stage = f"batch-{number:05d}"
        if not work.done(stage):
            if opened is None:
                opened = open_model(source, dtype, device, device_map)
                say_slow(opened, quiet)
                opened.register_forward_hook(lambda *_: step())
            steps = 0
            own_seed = seed * 1_000_003 + number
            made = own_words(opened, tokenizer, batch, kind=what, max_new_tokens=max_new_tokens, seed=own_seed)
            work.save(stage, {}, {"rows": made})
        return list(work.load(stage)[1]["rows"])

    written = 0
    with work.removed_if_without("batch-*.json"), shown:
        for number in count():
            rows += (made := batch_of(number))
            length = sum(len(tokenizer(_words(row))["input_ids"]) for row in made)
            written += length
            shown.update(length)
            if written >= tokens:
                break
            if not rows and number == FUTILE:
                raise FactorMixError(f"{model!r} wrote nothing in {FUTILE + 1} batches of kind {what}; try another.")
    with atomic_path(out) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    work.remove()
    typer.echo(f"{out}: {len(rows):,} {what} documents, {written:,} tokens")


def _words(row: dict[str, Any]) -> str:
    """What a line holds, without the template's own words."""
    if "text" in row:
        return str(row["text"])
    return "\n".join(message["content"] for message in row["messages"])
