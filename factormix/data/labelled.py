"""Reading labelled text: .jsonl files, one example a line, for stage 2 of MixDA and for `factormix predict`.

Run it::

    examples = read_labelled("train.jsonl")
    examples.kind                     # "single-label"
    examples.labels[0]                # "METHODS"

===============  ==================================================  ==========================
kind             a line                                              `labels` holds
===============  ==================================================  ==========================
single-label     ``{"text": str, "label": str or whole number}``     str
multi-label      ``{"text": str, "label": [str, ...]}``              tuple of str, sorted
regression       ``{"text": str, "label": number}``                  float
multiple-choice  ``{"text": str, "choices": [str, ...], "label"}``   int, the right choice from 0
===============  ==================================================  ==========================

The kind is found from all lines; whole numbers are classes unless one of the numbers is none, or the caller says
"regression". A multiple-choice label is the choice itself or its number from 0.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from factormix.run.errors import FactorMixError, choose, nearest

TaskKind = Literal["single-label", "multi-label", "regression", "multiple-choice"]
KINDS: tuple[TaskKind, ...] = get_args(TaskKind)
_NEEDED = 'a line holds {"text", "label"}, for multiple choice also "choices"'


@dataclass(frozen=True)
class Labelled:
    """Examples of one kind.

    Attributes:
        name: the file's stem.
        kind: see the module's table; None where labels are absent and nothing else tells.
        texts: never empty.
        labels: as the table says; None for a file without labels.
        choices: of each example of a multiple-choice file, else None.
        records: the lines as read.
        sha256: of the file.
    """

    name: str
    kind: TaskKind | None
    texts: list[str] = field(repr=False)
    labels: list[Any] | None = field(repr=False)
    choices: list[list[str]] | None = field(repr=False)
    records: list[dict[str, Any]] = field(repr=False)
    sha256: str

    def __len__(self) -> int:
        return len(self.texts)

    def __str__(self) -> str:
        return f"{self.name}: {len(self):,} {self.kind or 'unlabelled'} examples"

    def take(self, rows: Sequence[int]) -> Labelled:
        """The examples with these numbers, in this order."""
        return replace(
            self,
            texts=[self.texts[i] for i in rows],
            labels=None if self.labels is None else [self.labels[i] for i in rows],
            choices=None if self.choices is None else [self.choices[i] for i in rows],
            records=[self.records[i] for i in rows],
        )

    def classes(self) -> list[str]:
        """Every label that occurs, sorted; numbers by value. Empty for regression and multiple choice."""
        if self.kind not in ("single-label", "multi-label") or self.labels is None:
            return []
        found = set(self.labels) if self.kind == "single-label" else {each for row in self.labels for each in row}
        return sorted(found, key=lambda label: (not _is_number(label), float(label) if _is_number(label) else 0, label))


def read_labelled(path: str | Path, kind: str = "auto", labels: bool = True) -> Labelled:
    """Read one .jsonl file of examples.

    Args:
        path: the file.
        kind: "auto", or one of `KINDS` that every line must be.
        labels: False also takes lines without a label (all of them then, or none).

    Raises:
        FactorMixError: no such file, or a line that does not parse, lacks a key, or has a label of another kind than
            the others; the line is named.
    """
    if kind != "auto":
        choose("task kind", kind, KINDS)
    file = Path(path)
    records, numbers, digest = read_lines(file)
    where = [f"{str(file)!r} line {number}" for number in numbers]
    for record, at in zip(records, where):
        _check_text(record, at, labels)
    has_labels = ["label" in record for record in records]
    if any(has_labels) and not all(has_labels):
        at = where[has_labels.index(not has_labels[0])]
        raise FactorMixError(f"{at}: {'no' if has_labels[0] else 'a'} label, unlike the lines before it.")
    found = _kind(records, where, kind, has_labels[0])
    choices = [_choices(r, at) for r, at in zip(records, where)] if found == "multiple-choice" else None
    values = [_label(r, at, found) for r, at in zip(records, where)] if has_labels[0] and found else None
    return Labelled(file.stem, found, [r["text"] for r in records], values, choices, records, digest)


def read_lines(file: Path) -> tuple[list[dict[str, Any]], list[int], str]:
    """The JSON objects of a .jsonl file: (records, their line numbers, SHA-256 of the file).

    Raises:
        FactorMixError: no such file, not UTF-8, empty, or a line that is no JSON object (named).
    """
    if file.suffix != ".jsonl":
        raise FactorMixError(f"labelled text {str(file)!r} must be a .jsonl file: {_NEEDED}.")
    if not file.is_file():
        beside = [str(f) for f in file.parent.glob("*.jsonl")] if file.parent.is_dir() else []
        raise FactorMixError(f"labelled text {str(file)!r} does not exist.{nearest(str(file), beside)}")
    data = file.read_bytes()
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise FactorMixError(f"labelled text {str(file)!r} is not UTF-8 at byte {error.start}; convert it.") from error
    records, numbers = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise FactorMixError(
                f"{str(file)!r} line {number} is not JSON: {error.msg} at column {error.colno}."
            ) from error
        if not isinstance(record, dict):
            raise FactorMixError(f"{str(file)!r} line {number} is a {type(record).__name__}; {_NEEDED}.")
        records.append(record)
        numbers.append(number)
    if not records:
        raise FactorMixError(f"labelled text {str(file)!r} is empty; it must hold at least one example.")
    return records, numbers, hashlib.sha256(data).hexdigest()


def _check_text(record: dict[str, Any], where: str, labels: bool) -> None:
    for key in ("text", "label") if labels else ("text",):
        if key not in record:
            raise FactorMixError(f"{where} has no {key!r}; {_NEEDED}.{nearest(key, record)}")
    if not isinstance(record["text"], str) or not record["text"].strip():
        raise FactorMixError(f"{where}: 'text' received {record['text']!r} and needs a non-empty string.")


def _kind(records: list[dict[str, Any]], where: list[str], asked: str, labelled: bool) -> TaskKind | None:
    """The kind that all lines have.

    Raises:
        FactorMixError: lines of two kinds, or not of the kind asked for.
    """
    kinds = [_kind_of(record, at, labelled) for record, at in zip(records, where)]
    first = kinds[0]
    if set(kinds) == {"single-label", "regression"}:  # 3 beside 3.5 is a number too
        for record, at, each in zip(records, where, kinds):
            if each == "single-label" and not isinstance(record["label"], int):
                raise FactorMixError(f"{at}: label {record['label']!r}, where other lines have numbers.")
        first = "regression"
    elif len(set(kinds)) > 1:
        odd = next(i for i, each in enumerate(kinds) if each != first)
        raise FactorMixError(f"{where[odd]} is {kinds[odd]}, the lines before it are {first}; split the file by kind.")
    if asked == "auto" or asked == first:
        return first
    if asked == "regression" and labelled:
        for record, at in zip(records, where):
            if not isinstance(record["label"], int | float):
                raise FactorMixError(f"{at}: label {record['label']!r}; regression needs a number.")
        return "regression"
    if asked == "single-label" and first == "regression":
        raise FactorMixError(f"{where[0]}: the labels are numbers with fractions; a class is a string or whole number.")
    if labelled or asked == "multiple-choice":
        raise FactorMixError(f"{where[0]} is {first or 'plain text'}; {asked} was asked for.")
    return asked  # type: ignore[return-value]


def _kind_of(record: dict[str, Any], where: str, labelled: bool) -> TaskKind | None:
    if "choices" in record:
        return "multiple-choice"
    if not labelled:
        return None
    label = record["label"]
    if isinstance(label, list):
        return "multi-label"
    if isinstance(label, float):
        return "regression"
    if isinstance(label, str) or (isinstance(label, int) and not isinstance(label, bool)):
        return "single-label"
    raise FactorMixError(f"{where}: 'label' received {label!r}; allowed: a string, a number or a list of strings.")


def _choices(record: dict[str, Any], where: str) -> list[str]:
    choices = record["choices"]
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(c, str) and c.strip() for c in choices)
        or len(set(choices)) < len(choices)
    ):
        raise FactorMixError(f"{where}: 'choices' received {choices!r} and needs two or more different strings.")
    return choices


def _label(record: dict[str, Any], where: str, kind: TaskKind) -> Any:
    """The label as the module's table has it."""
    label = record["label"]
    if kind == "single-label":
        return str(label)
    if kind == "regression":
        if not math.isfinite(label):
            raise FactorMixError(f"{where}: label {label!r}; regression needs a finite number.")
        return float(label)
    if kind == "multi-label":
        if not all(isinstance(each, str) and each for each in label):
            raise FactorMixError(f"{where}: 'label' received {label!r} and needs a list of strings, perhaps empty.")
        return tuple(sorted(set(label)))
    choices = record["choices"]
    if label in choices:
        return choices.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(choices):
        return label
    raise FactorMixError(
        f"{where}: label {label!r}; allowed: one of the choices, or its number, 0 to {len(choices) - 1}."
    )


def _is_number(label: str) -> bool:
    try:
        return math.isfinite(float(label))
    except ValueError:
        return False
