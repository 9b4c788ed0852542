"""Packages of labelled text -> .jsonl files of {"text", "label"}. The splits are fixed and share no document."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from factormix.assets.convert_pubmed import HELD_OUT, PARTS, records
from factormix.assets.convert_text import find_folder
from factormix.assets.r_data import read_frame

SECTIONS = ("BACKGROUND", "OBJECTIVE", "METHODS", "RESULTS", "CONCLUSIONS")
REVIEW_SITES = ("amazon", "imdb", "yelp")
TEST_PART = 5  # one sentence in so many is for testing


def write_examples(path: Path, examples: Iterable[tuple[str, str]]) -> None:
    """One {"text", "label"} a line, every text once; of a text with two labels neither."""
    labels: dict[str, set[str]] = {}
    for text, label in examples:
        labels.setdefault(" ".join(text.split()), set()).add(label)
    lines = [
        json.dumps({"text": text, "label": next(iter(found))}, ensure_ascii=False)
        for text, found in labels.items()
        if text and len(found) == 1
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def convert_sections(packages: Sequence[Path], out: Path) -> None:
    """The sections of PubMed's structured abstracts, by the category that the library gave them (the RCT task).

    Split by the article's number as the abstracts of the asset "pubmed" are, so that an adapter injected from its
    training text has seen no abstract that these test on.
    """
    split: dict[str, list[tuple[str, str]]] = {"train": [], "dev": [], "test": []}
    seen: set[int] = set()
    for name in PARTS:
        for number, _, sections in records(find_folder(packages, f"**/data/{name}")):
            if number not in seen:
                seen.add(number)
                part = HELD_OUT.get(number % 20, "train")
                split[part] += [(text, category) for text, category in sections if category in SECTIONS]
    held: set[str] = set()
    for part in ("test", "dev", "train"):  # a section that stands in two abstracts stays in one part
        new = [(text, category) for text, category in split[part] if text not in held]
        write_examples(out / f"pubmed-sections-{part}.jsonl", new)
        held |= {text for text, _ in split[part]}


def convert_sentences(packages: Sequence[Path], out: Path) -> None:
    """Sentences of reviews, positive or negative; a fifth, by the first byte of the text's SHA-256, for testing."""
    for site in REVIEW_SITES:
        found = json.loads(find_folder(packages, f"**/test/fixtures/{site}.json").read_text(encoding="utf-8"))
        split: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
        for record in found:
            text = " ".join(record["text"].split())
            if text:  # the last record of each file is empty
                test = hashlib.sha256(text.encode()).digest()[0] % TEST_PART == 0
                split["test" if test else "train"].append((text, ("negative", "positive")[record["class"]]))
        for part, examples in split.items():
            write_examples(out / f"{site}-{part}.jsonl", examples)


def convert_foods(packages: Sequence[Path], out: Path) -> None:
    """Reviews of fine foods, five stars ("great") or fewer ("other"), split as in the package; no test text trains."""
    folder = find_folder(packages, "**/modeldata/data/Rdata.rdx").parent
    train, test = (read_frame(folder, f"{part}_data") for part in ("training", "testing"))
    held = {" ".join(text.split()) for text in test["review"]}
    kept = [(t, label) for t, label in zip(train["review"], train["score"]) if " ".join(t.split()) not in held]
    write_examples(out / "foods-train.jsonl", kept)
    write_examples(out / "foods-test.jsonl", zip(test["review"], test["score"]))
