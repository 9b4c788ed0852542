"""Write the page: one HTML file that contains everything and loads nothing from the network.

The template's three files (page.html, page.css, page.js) are in template/. The data are embedded as JSON in which no
character can end the script element. page.js writes text only as text, and a Content-Security-Policy forbids all else.
Router scores and domain weights are stored as 16-bit steps between a site's lowest and highest value.
"""

from __future__ import annotations

import base64
import html
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from factormix.run.directory import atomic_path, check_output_file
from factormix.run.errors import FactorMixError
from factormix.show.pieces import TOKEN_KINDS, Token
from factormix.show.summary import mean_of_domains, summarise
from factormix.show.trace import SiteTrace, Trace

STEPS = 65_535  # the largest 16-bit number
PART_MARK = "▪"  # shown for the later tokens of one character


def check_page(path: Path, overwrite: bool = False) -> None:
    """Refuse, before the model runs, a page that cannot be written or would replace a file.

    Args:
        path: the page to write.
        overwrite: whether an existing file may be replaced.

    Raises:
        FactorMixError: the suffix is not .html or .htm, the path is a directory, its folder does not exist, or the
            file exists and `overwrite` is False.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise FactorMixError(f"page {str(path)!r} ends in {path.suffix!r}; allowed: .html and .htm.")
    check_output_file(path, overwrite)


def write_page(found: Trace, path: str | Path, title: str = "Routing", overwrite: bool = False) -> None:
    """Write the page. If writing fails, no partial file is left.

    Args:
        found: what `trace` returned.
        path: the .html or .htm file to write.
        title: the heading, as plain text.
        overwrite: replace an existing file.

    Raises:
        FactorMixError: see `check_page`; or a site holds NaN or infinity.
    """
    check_page(Path(path), overwrite)
    with atomic_path(path) as temporary:
        temporary.write_text(render(found, title), encoding="utf-8")


def render(found: Trace, title: str = "Routing") -> str:
    """The page as a string."""
    folder = resources.files("factormix.show").joinpath("template")
    parts = {name: folder.joinpath(f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    fill = {"title": html.escape(title), "css": parts["css"], "js": parts["js"], "data": embed(payload(found, title))}
    # All places are filled in one pass, so that a text which contains {{data}} is not filled again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fill[match[1]], parts["html"])


def embed(values: Any) -> str:
    """JSON in ASCII that can neither end nor open an HTML element."""
    text = json.dumps(values, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def payload(found: Trace, title: str) -> dict[str, Any]:
    """The data that page.js reads: the summary's numbers, the tokens, and each site's values and choices."""
    numbers = summarise(found)
    everywhere = mean_of_domains(found)
    sites = [{**row, **_values(site)} for row, site in zip(numbers["sites"], found.sites, strict=True)]
    return {
        "title": title,
        "whole": found.whole,
        "groups": numbers["groups"],
        "kinds": TOKEN_KINDS,
        "tokens": [_token(token) for token in found.tokens],
        "sites": sites,
        "domains": None if everywhere is None else {**numbers["domains"], **_values(everywhere)},
    }


def _token(token: Token) -> list[Any]:
    """One token as [piece, gap, mark, kind, document, id]. The mark is shown if the piece is empty."""
    mark = "" if token.piece else PART_MARK if token.kind == "part of a character" else token.name
    return [token.piece, token.gap, mark, TOKEN_KINDS.index(token.kind), token.document, token.id]


def _values(site: SiteTrace) -> dict[str, Any]:
    """A site's scores (experts) or weights (domains) (T, C) as `low + step * n`, and the chosen columns (T, K)."""
    values = site.weights if site.scores is None else site.scores  # (T, C)
    if not bool(values.isfinite().all()):
        raise FactorMixError(
            f"{site.path} gave a token NaN or infinity, because the model's weights or activations hold them. Check "
            "the checkpoint, or use --dtype float32."
        )
    low = float(values.min())
    step = max((float(values.max()) - low) / STEPS, 1e-12)
    steps = ((values.double() - low) / step).round().clamp(0, STEPS)  # (T, C)
    return {
        "low": low,
        "step": step,
        "values": _sixteen_bits(steps),
        "chosen": None if site.chosen is None else _sixteen_bits(site.chosen),
    }


def _sixteen_bits(numbers: Tensor) -> str:
    """Little-endian unsigned 16-bit numbers, row by row, in base64."""
    return base64.b64encode(numbers.numpy().astype("<u2").tobytes()).decode("ascii")
