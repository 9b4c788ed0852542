"""Labelled text: each kind, what is refused with its line, and K-shot samples of all kinds."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factormix import FactorMixError
from factormix.data.fewshot import few_shot
from factormix.data.labelled import Labelled, read_labelled


def write(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("lines", "kind", "labels"),
    [
        ([("a", "x"), ("b", "y")], "single-label", ["x", "y"]),
        ([("a", 1), ("b", 0)], "single-label", ["1", "0"]),
        ([("a", ["x", "y"]), ("b", [])], "multi-label", [("x", "y"), ()]),
        ([("a", 1), ("b", 0.5)], "regression", [1.0, 0.5]),
    ],
)
def test_kinds(tmp_path: Path, lines: list[Any], kind: str, labels: list[Any]) -> None:
    found = read_labelled(write(tmp_path / "a.jsonl", *({"text": t, "label": label} for t, label in lines)))
    assert (found.kind, found.labels, found.name) == (kind, labels, "a")


def test_whole_numbers_are_a_regression_when_asked(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"text": "a", "label": 3}, {"text": "b", "label": 10})
    assert read_labelled(file).classes() == ["3", "10"]
    assert read_labelled(file, "regression").labels == [3.0, 10.0]


def test_multiple_choice_by_choice_or_number(tmp_path: Path) -> None:
    choices = {"choices": ["no", "yes"]}
    file = write(tmp_path / "a.jsonl", {"text": "a", "label": "yes", **choices}, {"text": "b", "label": 0, **choices})
    found = read_labelled(file)
    assert found.kind == "multiple-choice" and found.labels == [1, 0] and found.choices == [["no", "yes"]] * 2


def test_without_labels(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"})
    assert read_labelled(file, "single-label", labels=False).labels is None
    with pytest.raises(FactorMixError, match="line 1 has no 'label'"):
        read_labelled(file)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ([1], "line 2 is a list"),
        ({"txet": "a", "label": 1}, "line 2 has no 'text'.*Did you mean 'txet'"),
        ({"text": "", "label": "x"}, "line 2: 'text' received ''"),
        ({"text": "b", "label": None}, "line 2: 'label' received None"),
        ({"text": "b", "label": True}, "line 2: 'label' received True"),
        ({"text": "b", "label": ["x"]}, "line 2 is multi-label, the lines before it are single-label"),
        ({"text": "b", "label": 0.5}, "line 1: label 'x', where other lines have numbers"),
        ({"text": "b", "label": "x", "choices": ["x"]}, "line 2 is multiple-choice"),
    ],
)
def test_refused_with_the_line(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(FactorMixError, match=message):
        read_labelled(write(tmp_path / "a.jsonl", {"text": "a", "label": "x"}, line))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "a", "choices": ["x", "x"], "label": "x"}, "line 1: 'choices' received"),
        ({"text": "a", "choices": ["x", "y"], "label": 2}, "line 1: label 2; allowed: .* 0 to 1"),
        ({"text": "a", "label": float("nan")}, "line 1: label nan"),
        ({"text": "a", "label": ["x", 1]}, "needs a list of strings"),
    ],
)
def test_refused_labels(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(FactorMixError, match=message):
        read_labelled(write(tmp_path / "a.jsonl", line))


def examples(kind: Any, labels: list[Any], texts: list[str] | None = None) -> Labelled:
    texts = texts or [f"text {i}" for i in range(len(labels))]
    records = [{"text": t, "label": label} for t, label in zip(texts, labels)]
    return Labelled("made", kind, texts, labels, None, records, "")


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(8, 20), min_size=2, max_size=5),
    shots=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_k_of_each_class_and_disjoint(counts: list[int], shots: int, seed: int) -> None:
    labels = [f"c{c}" for c, count in enumerate(counts) for _ in range(count)]
    source = examples("single-label", labels)
    train, dev = few_shot(source, shots, seed)
    for part in (train, dev):
        assert part.labels is not None
        assert Counter(part.labels) == dict.fromkeys(set(labels), shots)
    assert not set(train.texts) & set(dev.texts)
    again = few_shot(source, shots, seed)
    assert (again[0].texts, again[1].texts) == (train.texts, dev.texts)
    assert few_shot(source, shots, seed, dev=examples("single-label", labels))[0].texts == train.texts


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.floats(-100, 100), min_size=40, max_size=80),
    shots=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_regression_is_binned(values: list[float], shots: int, seed: int) -> None:
    source = examples("regression", values)
    try:
        train, dev = few_shot(source, shots, seed, bins=4)
    except FactorMixError as error:  # many equal values leave ranges unequal
        assert "range [" in str(error)
        return
    assert len(train) == len(dev) <= 4 * shots and not set(train.texts) & set(dev.texts)
    if len(set(values)) == len(values):
        assert len(train) == 4 * shots
        count, ranks = len(values), [sorted(values).index(v) for v in train.labels or ()]
        quarters = [sum(rank >= count * i // 4 for i in (1, 2, 3)) for rank in ranks]
        assert Counter(quarters) == dict.fromkeys(range(4), shots)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.sets(st.sampled_from("abc")), min_size=60, max_size=90),
    shots=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_multi_label_has_k_of_each_label(rows: list[set[str]], shots: int, seed: int) -> None:
    labels = [tuple(sorted(row)) for row in rows]
    try:
        train, dev = few_shot(examples("multi-label", labels), shots, seed)
    except FactorMixError:
        return
    assert not set(train.texts) & set(dev.texts)
    for label in {each for row in labels for each in row}:
        assert sum(label in row for row in train.labels or ()) >= shots


def test_a_class_with_too_few_is_named() -> None:
    source = examples("single-label", ["a"] * 9 + ["b"] * 3)
    with pytest.raises(FactorMixError, match="4 training examples a class .*'b' has 3"):
        few_shot(source, 4, 0)
    with pytest.raises(FactorMixError, match="2 development examples a class that training left .*'b' has 1.*--dev"):
        few_shot(source, 2, 0)
    with pytest.raises(FactorMixError, match="shots received 0"):
        few_shot(source, 0, 0)


def test_a_text_that_comes_twice_is_one_example() -> None:
    source = examples("single-label", ["a"] * 4 + ["b"] * 4, ["same"] * 4 + [f"b{i}" for i in range(4)])
    with pytest.raises(FactorMixError, match="'a' has 1"):
        few_shot(source, 2, 0)
