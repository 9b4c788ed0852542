"""`factormix generate`: the greedy answer to one prompt."""

from __future__ import annotations

from typing import Annotated

import typer

from factormix.cli import options
from factormix.cli.models import locate, open_adapted, open_tokenizer, say_slow
from factormix.evaluate.answers import answer

SCHEMA_VERSION = 1


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="what to answer or continue")],
    adapter: options.Adapter = None,
    gate: options.Gate = None,
    mix: options.Mix = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="at most so many")] = 64,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="use the tokenizer's chat template, if any")] = True,
    dtype: options.Dtype = "auto",
    device: options.Device = "cpu",
    device_map: options.DeviceMap = None,
    quantize: options.Quantize = None,
    quiet: options.Quiet = False,
    json: options.Json = None,
) -> None:
    """Answer PROMPT greedily and print the answer, unedited."""
    options.check_json(json)
    source = locate(model, quiet)
    tokenizer = open_tokenizer(source)
    opened = open_adapted(source, adapter or (), gate, mix, dtype, device, device_map, quantize)
    say_slow(opened, quiet)
    said = answer(opened, tokenizer, prompt, max_new_tokens, chat)
    options.put_json(json, {"schema_version": SCHEMA_VERSION, "prompt": prompt, "answer": said})
    typer.echo(said)
