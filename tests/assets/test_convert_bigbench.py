"""Facts and chats from BIG-bench's task files, on files made here; with --download the real ones (test_assets)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from factormix.assets import convert_bigbench
from factormix.assets.convert_bigbench import convert_chat, convert_wikidata


def package(folder: Path, task: str, examples: list[dict[str, Any]]) -> Path:
    place = folder / "bigbench-1" / "bigbench" / "benchmark_tasks" / task
    place.mkdir(parents=True)
    (place / "task.json").write_text(json.dumps({"examples": examples}))
    return folder


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_facts_are_split_by_subject_and_asked_in_two_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_bigbench, "FACTS", 4)
    subjects = [f"subject {i}" for i in range(6)]
    examples = [{"input": f"The {r} of {s} is", "target": f"{r} {s}"} for r in ("capital", "country") for s in subjects]
    odd = [
        {"input": "The country of citizenship of Ann of Ghent is", "target": "Peru"},
        {"input": "The country of Kinyarwanda is", "target": ["Rwanda", "Uganda"]},  # two objects
        {"input": "Sussex shares a border with", "target": "Kent"},  # another form
    ]
    convert_wikidata([package(tmp_path / "p", "qa_wikidata", examples + odd)], tmp_path)
    facts, unseen = rows(tmp_path / "wikidata-facts.jsonl"), rows(tmp_path / "wikidata-unseen.jsonl")
    again = rows(tmp_path / "wikidata-reordered.jsonl")
    assert 4 <= len(facts) == len(again) <= 5 and 4 <= len(unseen) <= 5
    assert not {f["prompt"].split(" of ")[1] for f in facts} & {f["prompt"].split(" of ")[1] for f in unseen}
    turned = {"The country of citizenship of Ann of Ghent is": "Ann of Ghent's country of citizenship is"}
    for fact, other in zip(facts, again):
        relation, _, subject = fact["prompt"].removeprefix("The ").removesuffix(" is").partition(" of ")
        assert other["prompt"] == turned.get(fact["prompt"], f"{subject}'s {relation} is")
        assert other["targets"] == fact["targets"] and len(fact["targets"]) == 1
    monkeypatch.setattr(convert_bigbench, "FACTS", 100)
    convert_wikidata([tmp_path / "p"], tmp_path)
    asked = {row["prompt"] for row in rows(tmp_path / "wikidata-reordered.jsonl")}
    assert len(asked) == 13 and "Ann of Ghent's country of citizenship is" in asked


def test_chats_have_the_right_answer_and_no_question_on_both_sides(tmp_path: Path) -> None:
    examples = [{"input": f"Why {i}? ", "target_scores": {f"no {i}": 0, f"yes {i}": 1}} for i in range(50)]
    convert_chat([package(tmp_path / "p", "social_iqa", examples)], tmp_path)
    train, test = rows(tmp_path / "chat-train.jsonl"), rows(tmp_path / "chat-test.jsonl")
    assert len(train) + len(test) == 50 and 3 <= len(test) <= 20
    for row in train + test:
        user, assistant = row["messages"]
        number = user["content"].removeprefix("Why ").removesuffix("?")
        assert user == {"role": "user", "content": f"Why {number}?"}
        assert assistant == {"role": "assistant", "content": f"yes {number}"}
