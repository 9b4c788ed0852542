"""`factormix show`: one HTML page on which every token of a text is coloured by the experts that fired."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from factormix.cli import options
from factormix.cli.models import locate, locate_text, open_adapted, open_tokenizer
from factormix.data.text import read_documents
from factormix.run.errors import FactorMixError
from factormix.show.information import expert_information, serving
from factormix.show.page import check_page, write_page
from factormix.show.summary import summarise
from factormix.show.trace import Trace, trace

Out = Annotated[Path, typer.Option("-o", "--out", metavar="PAGE", help="the .html file to write")]
Tokens = Annotated[int, typer.Option("--tokens", help="tokens of each text, from its start; fewer if it is shorter")]


def show(
    model: options.Model,
    out: Out,
    text: options.Text = None,
    adapter: options.Adapter = None,
    gate: options.Gate = None,
    mix: options.Mix = None,
    tokens: Tokens = 512,
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    device_map: options.DeviceMap = None,
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
    json: options.Json = None,
) -> None:
    """Colour the tokens of texts by the experts that fired, or by their domain weights, site by site: one HTML page."""
    options.check_json(json)
    check_page(out, overwrite)
    if not text:
        raise FactorMixError("no text to show: give --text FILE, for example --text asset:brown-dev.")
    texts = [read_documents(path) for path in locate_text(text, quiet)]
    source = locate(model, quiet)
    tokenizer = open_tokenizer(source)
    opened = open_adapted(source, adapter or (), gate, mix, dtype, device, device_map)
    found = trace(opened, tokenizer, texts, tokens, quiet)
    write_page(found, out, f"{Path(model).name} reads {', '.join(each.name for each in texts)}", overwrite)
    options.put_json(json, summarise(found))
    kinds = " and ".join(dict.fromkeys(site.kind for site in found.sites))
    size = out.stat().st_size / 1e6
    typer.echo(f"{out}: {len(found.tokens):,} tokens, {kinds} at {len(found.sites)} sites, {size:.1f} MB")
    for line in _information(found):
        typer.echo(line)


def _information(found: Trace) -> list[str]:
    """Which experts serve which text: bits a site against shuffled names, and the strongest ties."""
    known = expert_information(found)
    if not known:
        return []
    rows = [("site", "bits of expert and text", "shuffled", "p")]
    rows += [(name, f"{of.bits:.4f}", f"{of.shuffled:.4f}", f"{of.p:.3f}") for name, of in known.items()]
    ties = [
        f"{site}: expert {expert} fires {lift:.2f} times as often for {text} as for all"
        for site, text, expert, lift in serving(known, list(dict.fromkeys(found.texts)))
    ]
    return ["", *options.aligned(rows), *ties]
