"""Packages of text -> files in FactorMix's text format: UTF-8, documents separated by a blank line, no markup.

Each converter takes the folders of the unpacked packages and an output folder. The splits are fixed: they depend on
names in the package, not on chance.
"""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Iterable, Sequence
from html.parser import HTMLParser
from pathlib import Path

from factormix.run.errors import FactorMixError


def write_documents(path: Path, documents: Iterable[str]) -> None:
    """Write documents separated by a blank line; blank lines inside a document become line ends, empty ones go."""
    clean = (re.sub(r"\s*\n\s*", "\n", document.strip()) for document in documents)
    path.write_text("\n\n".join(document for document in clean if document) + "\n", encoding="utf-8")


def find_folder(packages: Sequence[Path], pattern: str) -> Path:
    """The first path in the unpacked packages that matches a glob pattern."""
    found = next((path for folder in packages for path in sorted(folder.glob(pattern))), None)
    if found is None:
        raise FactorMixError(
            f"the package holds no {pattern!r}; its layout has changed, take the version in the table."
        )
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Brown corpus: word/tag tokens, a sentence a line, a tab before each paragraph


def convert_brown(packages: Sequence[Path], out: Path) -> None:
    """500 files of 2,000 words, a document each. Of the sorted names, numbers 0, 10, 20 ... are held out, 5, 15,
    25 ... are for development, the rest for training."""
    folder = find_folder(packages, "**/ca01").parent
    files = sorted(file for file in folder.iterdir() if re.fullmatch(r"c[a-z]\d\d", file.name))
    split: dict[str, list[str]] = {"train": [], "dev": [], "heldout": []}
    for number, file in enumerate(files):
        part = {0: "heldout", 5: "dev"}.get(number % 10, "train")
        split[part].append(brown_document(file.read_text(encoding="utf-8")))
    for part, documents in split.items():
        write_documents(out / f"brown-{part}.txt", documents)


def brown_document(tagged: str) -> str:
    """A tagged file as running text, one paragraph a line."""
    paragraphs: list[list[str]] = []
    for line in tagged.splitlines():
        words = [token.rpartition("/")[0] for token in line.split() if "/" in token and not token.startswith("**")]
        if words and (line.startswith("\t") or not paragraphs):
            paragraphs.append(words)
        elif words:
            paragraphs[-1] += words
    return "\n".join(_detokenise(words) for words in paragraphs)


def _detokenise(words: list[str]) -> str:
    words = [w for i, w in enumerate(words) if i == 0 or w != words[i - 1] or w not in (";", "?", "!", ":")]  # doubled
    for i in range(len(words) - 1):
        if words[i] == "''" and words[i + 1] in (",", ".", "?", "!"):  # as printed: the closing quote comes last
            words[i], words[i + 1] = words[i + 1], words[i]
    text, glue, quote_open = "", True, False
    for word in words:
        opens = word in ("``", "(", "[") or (word == "'" and not quote_open)
        closes = word in (",", ".", ";", ":", "?", "!", ")", "]", "''") or (word == "'" and quote_open)
        if word == "'":
            quote_open = not quote_open
        shown = '"' if word in ("``", "''") else _brown_signs(word)
        text += shown if glue or closes else " " + shown
        glue = opens
    return text


def _brown_signs(word: str) -> str:
    """The corpus's codes inside a word: ``32*0C`` is 32°C, ``f{t}`` is f(t), ``**ya`` a Greek letter (left out)."""
    word = re.sub(r"(?<=\d)\*&?0", "°", word)
    return re.sub(r"\*\*[a-z]{2}", "", word).replace("{", "(").replace("}", ")")


# ---------------------------------------------------------------------------------------------------------------------
# Debian Administrator's Handbook: DocBook's HTML


def convert_handbook(packages: Sequence[Path], out: Path) -> None:
    """One document a section page; of the sorted pages that hold prose, even numbers for development, odd for test."""
    folder = find_folder(packages, "**/html/en-US")
    documents = [html_prose(page.read_text(encoding="utf-8")) for page in sorted(folder.glob("*.html"))]
    documents = [document for document in documents if len(document) >= 500]  # characters; less is a list of links
    write_documents(out / "handbook-dev.txt", documents[0::2])
    write_documents(out / "handbook-test.txt", documents[1::2])


def html_prose(html: str) -> str:
    """Headings and paragraphs of a DocBook page, one a line: no navigation, listings, tables or captions."""
    reader = _Prose()
    reader.feed(html)
    reader.close()
    reader.end_paragraph()
    return "\n".join(reader.paragraphs)


class _Prose(HTMLParser):
    _blocks = frozenset({"div", "p", "li", "ul", "ol", "dl", "dt", "dd", "h1", "h2", "h3", "h4", "h5", "body", "br"})
    _skipped_tags = frozenset({"head", "pre", "table", "script", "style"})
    _skipped_classes = frozenset(
        {"docnav", "toc", "figure", "footnotes", "indexterm", "mediaobject", "index", "list-of-figures"}
    )
    _skipped_ids = frozenset({"banner", "title"})
    _void = frozenset({"br", "img", "hr", "meta", "link", "input", "col"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._text = ""
        self._open: list[tuple[str, bool]] = []  # tag, and whether what is inside is skipped

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self._blocks:
            self.end_paragraph()
        if tag in self._void:
            return
        values = dict(attrs)
        classes = set((values.get("class") or "").split())
        skip = (
            tag in self._skipped_tags or bool(classes & self._skipped_classes) or values.get("id") in self._skipped_ids
        )
        self._open.append((tag, skip or self._skipping))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self._blocks:
            self.end_paragraph()

    def handle_endtag(self, tag: str) -> None:
        if tag in self._blocks:
            self.end_paragraph()
        if any(open_tag == tag for open_tag, _ in self._open):
            while self._open.pop()[0] != tag:
                pass

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._text += data

    @property
    def _skipping(self) -> bool:
        return bool(self._open) and self._open[-1][1]

    def end_paragraph(self) -> None:
        text = re.sub(r"\s+", " ", self._text.replace("\u200b", "")).strip()
        text = re.sub(r"^(?:Chapter )?\d+(?:\.\d+)*\.\s+(?=\S)", "", text)  # "6.3. The apt-cache Command"
        self._text = ""
        if re.search(r"[A-Za-z]", text):
            self.paragraphs.append(text)


# ---------------------------------------------------------------------------------------------------------------------
# FOLDOC: a dictd dictionary, gzip with an index of base-64 offsets


def convert_foldoc(packages: Sequence[Path], out: Path) -> None:
    """One document an entry of at least 200 characters; split in two by the first byte of the headword's SHA-256."""
    index = find_folder(packages, "**/foldoc.index").read_text(encoding="utf-8")
    with gzip.open(find_folder(packages, "**/foldoc.dict.dz")) as file:
        data = file.read()
    places = set()
    for line in index.splitlines():
        headword, offset, length = line.split("\t")[:3]
        if not headword.startswith("00-database") and not headword.startswith("00database"):
            places.add((_base64_number(offset), _base64_number(length)))
    split: dict[str, list[str]] = {"dev": [], "test": []}
    for start, size in sorted(places):
        document = foldoc_document(data[start : start + size].decode("utf-8", "replace"))
        if len(document) >= 200:  # characters; less is a cross-reference
            headword = document.partition("\n")[0]
            odd = hashlib.sha256(headword.encode()).digest()[0] % 2
            split["test" if odd else "dev"].append(document)
    for part, documents in split.items():
        write_documents(out / f"foldoc-{part}.txt", documents)


def foldoc_document(entry: str) -> str:
    """An entry as its headword and its paragraphs, one a line; no categories, dates, sources and link braces."""
    blocks = [block for block in re.split(r"\n\n+", entry) if block.strip()]  # "   " alone is a broken line
    if len(blocks) < 2:
        return ""
    headword = blocks[0].strip().splitlines()[0].strip()
    lines = [_foldoc_paragraph(block) for block in blocks[1:]]
    return "\n".join([headword, *(line for line in lines if line)]) if any(lines) else ""


def _foldoc_paragraph(block: str) -> str:
    lines = [line for line in block.splitlines() if line.strip()]
    if sum(line.startswith((" " * 6, "\t")) for line in lines) * 2 > len(lines):  # an example or a table
        return ""
    text = " ".join(" ".join(lines).split())
    text = re.sub(r"^(?:\d+\. )?(?:<[^<>]*> ?)+", "", text)  # <language, humour>
    text = re.sub(r"\[\{[^{}]*\}\]", "", text)  # [{Jargon File}]
    text = re.sub(r"\s*\((?:ftp|https?|news|gopher|telnet|mailto):[^\s{}]*\)(?=[\s}.,;:]|$)", "", text)
    for _ in range(2):  # links lie inside links now and then
        text = re.sub(r"\{([^{}]*?) \([^{}]*\)\}", r"\1", text)  # {shown (target)}
        text = re.sub(r"\{([^{}]*)\}", r"\1", text)  # {shown}
    text = re.sub(r"__(\S(?:.*?\S)?)__", r"\1", text).strip()
    if re.fullmatch(r"\(\d{4}-\d\d(?:-\d\d)?\)|[\W\d]*", text) or re.fullmatch(r"[^.]{0,60}wiki entry\.?", text):
        return ""
    letters = sum(letter.isalpha() for letter in text)
    return text if letters * 5 >= len(text.replace(" ", "")) * 3 else ""  # else a drawing, a table or a number


def _base64_number(digits: str) -> int:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    number = 0
    for digit in digits:
        number = number * 64 + letters.index(digit)
    return number
