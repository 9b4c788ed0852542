"""The page: what it holds, that no text breaks out of it, and that it asks the network for nothing."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy
import pytest
import torch

from factormix.run.errors import FactorMixError
from factormix.show.page import render, write_page
from factormix.show.summary import summarise
from factormix.show.trace import Trace
from tests.show.tiny import PIECES


class Reader(HTMLParser):
    """Elements with their attributes and text, as a browser would split the page."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self._open = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = str(dict(attrs).get("id") or tag)

    def handle_data(self, data: str) -> None:
        self.text[self._open] = self.text.get(self._open, "") + data


def stored(page: str) -> dict:
    return json.loads(Reader(page).text["data"])


def unpacked(text: str) -> numpy.ndarray:
    return numpy.frombuffer(base64.b64decode(text), dtype="<u2").astype("int64")


def test_the_data_in_the_page_are_the_trace(small: Trace) -> None:
    data, numbers = stored(render(small, "a title")), summarise(small)
    assert [token[0] for token in data["tokens"]] == PIECES
    assert data["tokens"][5][2] == "<s>"  # the mark of a token without a piece
    assert data["groups"] == numbers["groups"] and data["title"] == "a title"
    for site, numbered, row in zip(small.sites, numbers["sites"], data["sites"], strict=True):
        assert {key: row[key] for key in numbered} == numbered
        values = row["low"] + row["step"] * unpacked(row["values"]).reshape(6, -1)
        want = site.weights if site.scores is None else site.scores
        assert torch.allclose(torch.tensor(values), want.double(), atol=1e-3)
        if site.chosen is not None:
            assert unpacked(row["chosen"]).reshape(6, 2).tolist() == site.chosen.tolist()
    assert data["domains"]["columns"] == ["law", "<i>medicine</i>"]


def test_no_text_breaks_out(small: Trace) -> None:
    names = replace(small, documents=("</script><img src=x onerror=alert(1)>", "<!-- second"))
    page = Reader(render(names, "</title><script>alert(1)</script>&amp;"))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2 and not {"img", "b", "i"} & set(tags)
    assert page.text["title"].strip() == page.text["h1"].strip() == "</title><script>alert(1)</script>&amp;"
    assert json.loads(page.text["data"])["groups"]["document"][0]["name"] == names.documents[0]


def test_the_data_are_plain_ascii_without_markup(small: Trace) -> None:
    data = render(small).partition('id="data">')[2].partition("</script>")[0]
    assert data.isascii() and not set("<>&") & set(data)


def test_nothing_is_loaded(small: Trace) -> None:
    page = Reader(render(small))
    loading = {"src", "href", "action", "data", "srcset"}
    assert not [(tag, attrs) for tag, attrs in page.elements if loading & attrs.keys()]
    assert "default-src 'none'" in str([attrs for tag, attrs in page.elements if tag == "meta"])
    assert not any(word in page.text["script"] + page.text["style"] for word in ("http:", "https:", "url(", "@import"))
    assert not any(word in page.text["script"] for word in ("innerHTML", "outerHTML", "insertAdjacent", "eval("))


def test_a_page_of_many_tokens_and_sites_is_small(small: Trace) -> None:
    """500 tokens at 30 sites of 12 experts, 4 firing: under a megabyte."""
    scores = torch.randn(500, 12, generator=torch.Generator().manual_seed(0))
    site = replace(small.sites[0], columns=tuple(map(str, range(12))), weights=torch.ones(500, 12), scores=scores)
    site = replace(site, chosen=scores.topk(4).indices)
    tokens = tuple(small.tokens[t % 4] for t in range(500))
    assert len(render(replace(small, tokens=tokens, sites=(site,) * 30))) < 1e6


def test_not_a_number_is_refused(small: Trace) -> None:
    scores = small.sites[0].scores.clone()
    scores[2, 1] = float("nan")
    with pytest.raises(FactorMixError, match=r"layers\.0\.mlp gave a token NaN.*--dtype float32"):
        render(replace(small, sites=(replace(small.sites[0], scores=scores),)))


def test_equal_values_everywhere(small: Trace) -> None:
    flat = replace(small.sites[2], weights=torch.ones(6, 2))
    row = stored(render(replace(small, sites=(flat,))))["sites"][0]
    assert row["low"] == 1.0 and unpacked(row["values"]).tolist() == [0] * 12


def test_writing(small: Trace, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_page(small, page, "one")
    with pytest.raises(FactorMixError, match=r"page\.html' exists.*--overwrite"):
        write_page(small, page, "two")
    assert stored(page.read_text(encoding="utf-8"))["title"] == "one"
    write_page(small, page, "two", overwrite=True)
    assert stored(page.read_text(encoding="utf-8"))["title"] == "two"
    assert list(tmp_path.iterdir()) == [page]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("page.txt", r"ends in '\.txt'; allowed: \.html and \.htm"),
        ("absent/page.html", "there is no directory"),
        ("folder.html", "is a directory"),
    ],
)
def test_places_that_cannot_be_written(small: Trace, tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(FactorMixError, match=words):
        write_page(small, tmp_path / name, overwrite=True)
