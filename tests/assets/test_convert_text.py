"""Converters on small made-up packages: what is kept, what goes."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from factormix.assets.convert_text import (
    brown_document,
    convert_brown,
    convert_foldoc,
    convert_handbook,
    foldoc_document,
    html_prose,
    write_documents,
)
from factormix.data.text import read_documents
from factormix.run.errors import FactorMixError


@pytest.mark.parametrize(
    ("tagged", "text"),
    [
        ("The/at jury/nn said/vbd ,/, no/at ./.", "The jury said, no."),
        ("(/( It/pps ended/vbd )/) --/-- at/in last/ap ;/. ;/.", "(It ended) -- at last;"),
        ("``/`` Why/wrb ''/'' ?/. ?/. he/pps said/vbd ./.", '"Why?" he said.'),
        ("the/at '/' list/nn '/' and/cc so/rb", "the 'list' and so"),
        ("at/in 32*0C./nn **zg 1-1/2/cd CuK**ya/nn f{t}/nn", "at 32°C. 1-1/2 CuK f(t)"),
        ("\n\n\tOne/cd ./.\nTwo/cd ./.\n\n\n\tThree/cd ./.\n", "One. Two.\nThree."),
    ],
)
def test_brown(tagged: str, text: str) -> None:
    assert brown_document(tagged) == text


def test_brown_split_is_by_file_number(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    for i in range(1, 31):
        (tmp_path / "package" / f"ca{i:02}").write_text(f"\n\n\tfile/nn {i}/cd ./.\n\n\tend/nn\n")
    (tmp_path / "package" / "README").write_text("not/nn text/nn")
    convert_brown([tmp_path], tmp_path)
    got = {part: read_documents(tmp_path / f"brown-{part}.txt").texts for part in ("train", "dev", "heldout")}
    assert got["heldout"] == [f"file {i}.\nend" for i in (1, 11, 21)]
    assert got["dev"] == [f"file {i}.\nend" for i in (6, 16, 26)]
    assert len(got["train"]) == 24


PAGE = """<html><head><title>T</title></head><body><p id="title"><a href="x">Site</a></p>
<ul class="docnav top"><li>Prev</li></ul><div class="section"><div class="titlepage"><div><h2 class="title">6.3. The
<code>apt</code>\u00a0Command</h2></div></div><a class="indexterm"></a><div class="para">
 Runs &amp; <em>shows</em><br/>all <a href="y">of it</a>.<pre class="screen">$ apt update</pre> After.</div>
<div class="toc"><ul><li>Contents</li></ul></div><table><tr><td>cell</td></tr></table>
<ul><li><div class="para">An item.</div></li></ul></div><img src="z"><p>\u2014</p></body></html>"""


def test_handbook_prose_only(tmp_path: Path) -> None:
    assert html_prose(PAGE).split("\n") == ["The apt Command", "Runs & shows", "all of it. After.", "An item."]
    folder = tmp_path / "usr/share/doc/debian-handbook/html/en-US"
    folder.mkdir(parents=True)
    for i in range(4):
        (folder / f"sect.{i}.html").write_text(f"<body><div>Section {i}.</div><p>{'prose ' * 100}</p></body>")
    (folder / "index.html").write_text(PAGE)
    convert_handbook([tmp_path], tmp_path)
    first = [text.split("\n")[0] for text in read_documents(tmp_path / "handbook-dev.txt").texts]
    assert first == ["Section 0.", "Section 2."]
    assert len(read_documents(tmp_path / "handbook-test.txt")) == 2


def test_foldoc_entry() -> None:
    entry = """big red switch
BRS

   <jargon, hardware> (BRS) The {power switch
   (power)} of a __computer__, see {http {URL}
   (http://example.com/a)} or the
{wiki
   \n(https://example.com/b)}.

      +----+   drawing
      |    |   of it

   a|b|c|1|2|3|4

   [{Jargon File}]

   (2004-08-20)
"""
    assert foldoc_document(entry) == ("big red switch\n(BRS) The power switch of a computer, see http URL or the wiki.")
    assert foldoc_document("nothing\n\n   (2004-08-20)\n") == ""


def test_foldoc_reads_entries_by_the_index(tmp_path: Path) -> None:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def number(value: int) -> str:
        return (number(value // 64) if value >= 64 else "") + letters[value % 64]

    data, index = "", ""
    for i in range(20):
        entry = f"entry {i}\n\n   <x> {'words ' * (50 if i else 2)}\n"
        place = f"{number(len(data))}\t{number(len(entry))}"
        index += f"entry {i}\t{place}\nalias {i}\t{place}\n"
        data += entry
    (tmp_path / "foldoc.index").write_text(index)
    (tmp_path / "foldoc.dict.dz").write_bytes(gzip.compress(data.encode()))
    convert_foldoc([tmp_path], tmp_path)
    dev, test = (read_documents(tmp_path / f"foldoc-{part}.txt").texts for part in ("dev", "test"))
    assert sorted(text.split("\n")[0] for text in dev + test) == sorted(f"entry {i}" for i in range(1, 20))
    assert dev and test


def test_documents_hold_no_blank_lines(tmp_path: Path) -> None:
    write_documents(tmp_path / "a.txt", ["a\n\n\n b ", "  ", "c"])
    assert read_documents(tmp_path / "a.txt").texts == ["a\nb", "c"]


def test_a_changed_layout_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FactorMixError, match="holds no .*ca01"):
        convert_brown([tmp_path], tmp_path)
