"""Labelled assets: the converters on packages made here; with --download the real ones."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from factormix import FactorMixError
from factormix.assets.convert_labelled import convert_foods, convert_sections, convert_sentences, write_examples
from factormix.assets.convert_pubmed import PARTS
from factormix.assets.fetch import fetch
from factormix.assets.r_data import read_frame
from factormix.data.fewshot import few_shot
from factormix.data.labelled import read_labelled


def lines(path: Path) -> list[tuple[str, str]]:
    return [(r["text"], r["label"]) for r in map(json.loads, path.read_text(encoding="utf-8").splitlines())]


def test_a_text_once_and_none_with_two_labels(tmp_path: Path) -> None:
    write_examples(tmp_path / "a.jsonl", [("x  y", "1"), ("x y", "1"), ("z", "1"), ("z", "2"), ("", "1")])
    assert lines(tmp_path / "a.jsonl") == [("x y", "1")]


def article(number: int, *sections: tuple[str, str]) -> str:
    parts = "".join(f'<AbstractText NlmCategory="{c}">{t}</AbstractText>' for c, t in sections)
    return (
        f"<PubmedArticle><MedlineCitation><PMID>{number}</PMID><Article><ArticleTitle>T{number}</ArticleTitle>"
        f"<Abstract>{parts}</Abstract></Article></MedlineCitation></PubmedArticle>"
    )


def test_sections_are_split_by_document(tmp_path: Path) -> None:
    data = tmp_path / "package" / "data"
    data.mkdir(parents=True)
    articles = [
        article(n, ("METHODS", "all alike"), ("METHODS", f"m{n}"), ("RESULTS", f"r{n}"), ("UNASSIGNED", f"u{n}"))
        for n in range(1, 41)
    ]
    for name, some in zip(PARTS, (articles, articles[:3])):  # the second file repeats three articles
        (data / name).write_bytes(gzip.compress(f"<Set>{''.join(some)}</Set>".encode()))
    convert_sections([tmp_path / "package"], tmp_path)
    found = {part: lines(tmp_path / f"pubmed-sections-{part}.jsonl") for part in ("train", "dev", "test")}
    assert found["test"].pop(0) == ("all alike", "METHODS")  # a text of all parts stays in the test set alone
    assert found["test"] == [("m20", "METHODS"), ("r20", "RESULTS"), ("m40", "METHODS"), ("r40", "RESULTS")]
    assert {t for t, _ in found["dev"]} == {"m10", "r10", "m30", "r30"} and len(found["train"]) == 72


def test_sentences(tmp_path: Path) -> None:
    fixtures = tmp_path / "package" / "test" / "fixtures"
    fixtures.mkdir(parents=True)
    rows = [{"text": f"t{i} ", "class": i % 2} for i in range(50)] + [{"text": "", "class": None}]
    for site in ("amazon", "imdb", "yelp"):
        (fixtures / f"{site}.json").write_text(json.dumps(rows))
    convert_sentences([tmp_path / "package"], tmp_path)
    train, test = lines(tmp_path / "amazon-train.jsonl"), lines(tmp_path / "amazon-test.jsonl")
    assert len(train) + len(test) == 50 and 3 <= len(test) <= 20
    assert all(label == ("negative", "positive")[int(text[1:]) % 2] for text, label in train + test)


class R:
    """Writes what `read_frame` reads: R's XDR serialisation of a few types."""

    @staticmethod
    def chars(text: str | None) -> bytes:
        data = b"" if text is None else text.encode()
        return struct.pack(">ii", 9 | 1 << 12, -1 if text is None else len(data)) + data

    @classmethod
    def strings(cls, items: list[str | None]) -> bytes:
        return struct.pack(">ii", 16, len(items)) + b"".join(map(cls.chars, items))

    @classmethod
    def attributes(cls, **values: bytes) -> bytes:
        out = b""
        for name, value in values.items():
            out += struct.pack(">i", 2 | 0x400) + struct.pack(">i", 1) + cls.chars(name) + value
        return out + struct.pack(">i", 254)

    @classmethod
    def factor(cls, codes: list[int], levels: list[str | None]) -> bytes:
        body = struct.pack(f">ii{len(codes)}i", 13 | 0x200, len(codes), *codes)
        return body + cls.attributes(levels=cls.strings(levels))

    @classmethod
    def named(cls, **values: bytes) -> bytes:
        body = struct.pack(">ii", 19 | 0x200, len(values)) + b"".join(values.values())
        return body + cls.attributes(names=cls.strings(list(values)))

    @staticmethod
    def numbers(*values: int) -> bytes:
        return struct.pack(f">ii{len(values)}i", 13, len(values), *values)

    @staticmethod
    def file(body: bytes, version: int = 3) -> bytes:
        start = b"X\n" + struct.pack(">iii", version, 0x40200, 0x30500)
        return start + (struct.pack(">i", 5) + b"UTF-8" if version == 3 else b"") + body


FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6 | lzma.PRESET_EXTREME}]
PACKERS = {
    "gzip": zlib.compress,
    "bzip2": lambda data: b"2" + bz2.compress(data),
    "xz": lambda data: b"Z" + lzma.compress(data, lzma.FORMAT_RAW, filters=FILTERS),
}


def r_package(folder: Path, pack: Any, **frames: bytes) -> Path:
    data, places, blob = folder / "modeldata" / "data", {}, b""
    data.mkdir(parents=True)
    for name, frame in frames.items():
        packed = struct.pack(">i", len(frame)) + pack(frame)
        places[name] = R.numbers(len(blob), len(packed))
        blob += packed
    index = R.named(variables=R.named(**places), compressed=R.numbers(3))
    (data / "Rdata.rdx").write_bytes(gzip.compress(R.file(index)))
    (data / "Rdata.rdb").write_bytes(blob)
    return data


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("version", [2, 3])
def test_data_frames_of_r(tmp_path: Path, packer: str, version: int) -> None:
    frame = R.named(review=R.strings(["good", None]), score=R.factor([2, -(2**31)], ["other", "great"]))
    data = r_package(tmp_path, PACKERS[packer], training_data=R.file(frame, version))
    assert read_frame(data, "training_data") == {"review": ["good", None], "score": ["great", None]}
    with pytest.raises(FactorMixError, match="no data set 'iris'; it has training_data"):
        read_frame(data, "iris")


def test_foods(tmp_path: Path) -> None:
    train = R.named(review=R.strings(["a", "b", "both"]), score=R.factor([1, 2, 1], ["great", "other"]))
    test = R.named(review=R.strings(["c", "both"]), score=R.factor([2, 1], ["great", "other"]))
    r_package(tmp_path / "p", zlib.compress, training_data=R.file(train), testing_data=R.file(test))
    convert_foods([tmp_path / "p"], tmp_path)
    assert lines(tmp_path / "foods-train.jsonl") == [("a", "great"), ("b", "other")]
    assert lines(tmp_path / "foods-test.jsonl") == [("c", "other"), ("both", "great")]


@pytest.mark.download
@pytest.mark.parametrize(
    ("name", "test", "classes", "least"),
    [
        ("pubmed-sections-train", "pubmed-sections-test", 5, 19_000),
        ("amazon-train", "amazon-test", 2, 750),
        ("yelp-train", "yelp-test", 2, 750),
        ("foods-train", "foods-test", 2, 3_900),
    ],
)
def test_the_real_ones(name: str, test: str, classes: int, least: int) -> None:
    train, held = read_labelled(fetch(name)), read_labelled(fetch(test))
    assert train.kind == "single-label" and len(train.classes()) == classes and len(train) >= least
    assert train.classes() == held.classes() and not set(train.texts) & set(held.texts)
    few_shot(train, 16, 0)
