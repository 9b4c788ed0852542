"""PubMed's XML -> titles and abstracts, one document an article."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from factormix.assets.convert_text import find_folder, write_documents

PARTS = ("pubmed20n0014.xml.gz", "pubmed21n1298.xml.gz")  # of the baseline of 2020 and of the updates of 2021
LONG = 80  # letters of a title or section that two articles do not share by chance
HELD_OUT = {0: "test", 10: "dev"}  # by the article's number modulo 20: 5 % each


def convert_pubmed(packages: Sequence[Path], out: Path) -> None:
    """Articles with an abstract, each once, in the order of the files; split by the article's number (PMID)."""
    split: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
    seen: set[int] = set()
    for name in PARTS:
        for number, document in articles(find_folder(packages, f"**/data/{name}")):
            if number not in seen:
                seen.add(number)
                split[HELD_OUT.get(number % 20, "train")].append(document)
    held: set[str] = set()
    for part in ("test", "dev", "train"):  # some abstracts come under two numbers: they stay in one part
        new = [document for document in split[part] if held.isdisjoint(document.split("\n"))]
        write_documents(out / f"pubmed-{part}.txt", new)
        held |= {line for document in new for line in document.split("\n") if len(line) >= LONG}


def articles(file: Path) -> Iterator[tuple[int, str]]:
    """(PMID, document) of every article with an abstract: the title, then the abstract's sections, one a line."""
    for number, title, sections in records(file):
        texts = [text for text, _ in sections]
        yield number, "\n".join([title, *texts] if title else texts)


def records(file: Path) -> Iterator[tuple[int, str, list[tuple[str, str]]]]:
    """(PMID, title, [(section, category)]) of every article with an abstract; the category is the library's
    (NlmCategory), "" where a section has none."""
    with gzip.open(file) as stream:
        for _, element in ElementTree.iterparse(stream):
            if element.tag != "PubmedArticle":
                continue
            number = element.findtext("MedlineCitation/PMID") or "0"
            title = _text(element.find("MedlineCitation/Article/ArticleTitle"))
            parts = element.iterfind("MedlineCitation/Article/Abstract/AbstractText")
            sections = [(_text(part), part.get("NlmCategory", "")) for part in parts]
            sections = [(text, category) for text, category in sections if text]
            if sections:
                yield int(number), title, sections
            element.clear()  # the whole tree would take gigabytes


def _text(element: ElementTree.Element | None) -> str:
    """The words of an element and of the markup in it (sub, sup, i), on one line."""
    text = "" if element is None else " ".join("".join(element.itertext()).split())
    return re.sub(r"\s*\(ABSTRACT TRUNCATED AT \d+ WORDS\)", "", text)
