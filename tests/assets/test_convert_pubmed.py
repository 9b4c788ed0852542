"""PubMed's XML as documents: title and sections, each article once, split by its number."""

from __future__ import annotations

import gzip
from pathlib import Path

from factormix.assets.convert_pubmed import PARTS, convert_pubmed
from factormix.data.text import read_documents


def article(number: int, title: str, *sections: str) -> str:
    body = "".join(f"<AbstractText Label='X'>{section}</AbstractText>" for section in sections)
    abstract = f"<Abstract>{body}<CopyrightInformation>(c)</CopyrightInformation></Abstract>" if sections else ""
    return (
        f"<PubmedArticle><MedlineCitation><PMID Version='1'>{number}</PMID><Article>"
        f"<ArticleTitle>{title}</ArticleTitle>{abstract}</Article></MedlineCitation></PubmedArticle>"
    )


def test_articles_with_an_abstract_once_each_split_by_number(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    first = article(20, "On CO<sub>2</sub>.", "Some\n  gas.", "It <i>rises</i>. (ABSTRACT TRUNCATED AT 250 WORDS)")
    second = article(31, "None.") + article(30, "Dev.", "d") + article(21, "Train.", "t") + article(20, "Again.", "x")
    for name, body in zip(PARTS, (first, second)):
        text = f"<PubmedArticleSet>{body}</PubmedArticleSet>"
        (tmp_path / "data" / name).write_bytes(gzip.compress(text.encode()))
    convert_pubmed([tmp_path], tmp_path)
    parts = {p: read_documents(tmp_path / f"pubmed-{p}.txt").texts for p in ("train", "dev", "test")}
    assert parts["test"] == ["On CO2.\nSome gas.\nIt rises."]
    assert parts["dev"] == ["Dev.\nd"] and parts["train"] == ["Train.\nt"]


def test_an_abstract_under_two_numbers_stays_in_one_part(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    words = "the same long section, word for word, in two articles of different numbers and titles, as it happens"
    body = article(21, "Train.", "own", words) + article(40, "Test.", words) + article(30, "Dev.", "short")
    body += article(23, "Other.", "short")  # short ones may well be alike
    for name in PARTS:
        (tmp_path / "data" / name).write_bytes(gzip.compress(f"<PubmedArticleSet>{body}</PubmedArticleSet>".encode()))
    convert_pubmed([tmp_path], tmp_path)
    parts = {p: read_documents(tmp_path / f"pubmed-{p}.txt").texts for p in ("train", "dev", "test")}
    assert parts == {"train": ["Other.\nshort"], "dev": ["Dev.\nshort"], "test": [f"Test.\n{words}"]}
