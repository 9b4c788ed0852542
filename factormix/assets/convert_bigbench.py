"""BIG-bench tasks -> facts with prompts of two forms, and short chats. The splits depend on the text, not on chance."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from factormix.assets.convert_text import find_folder

FACTS = 2000  # for training
_RELATION = re.compile(
    r"The ((?:country|place) of [a-z]+|basic form of government|office held by head of government|[a-z ]+?)"
    r" of ([^,]+) is"
)
HELD_OUT = 5  # one chat in so many


def convert_wikidata(packages: Sequence[Path], out: Path) -> None:
    """Facts "The capital of Occitania is -> Toulouse", each with one object.

    wikidata-facts.jsonl has 2,000 of them, wikidata-reordered.jsonl the same ones asked otherwise ("Occitania's
    capital is -> Toulouse"), and wikidata-unseen.jsonl 2,000 others. A subject is in one of the two sets only.
    """
    facts: dict[str, dict[str, tuple[str, str]]] = {}  # by subject, then by prompt
    for example in _examples(packages, "qa_wikidata"):
        found = _RELATION.fullmatch(example["input"])
        if found and isinstance(example["target"], str):
            facts.setdefault(found[2], {})[example["input"]] = (found[1], example["target"])
    chosen = []
    for subject in sorted(facts, key=_digest):
        for prompt, (relation, target) in facts[subject].items():
            chosen.append((subject, prompt, f"{subject}'s {relation} is", target))
    split = _whole_subjects(chosen, FACTS)
    parts = {"facts": chosen[:split], "unseen": chosen[split : _whole_subjects(chosen, split + FACTS)]}
    for name, rows in parts.items():
        _write(out / f"wikidata-{name}.jsonl", ({"prompt": p, "targets": [t]} for _, p, _, t in rows))
    reordered = ({"prompt": again, "targets": [target]} for _, _, again, target in parts["facts"])
    _write(out / "wikidata-reordered.jsonl", reordered)


def convert_chat(packages: Sequence[Path], out: Path) -> None:
    """Everyday questions with their right answers (Social IQa), as chats of two messages; a fifth is for testing."""
    split: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for example in _examples(packages, "social_iqa"):
        answer = max(example["target_scores"], key=example["target_scores"].__getitem__)
        part = "test" if int(_digest(example["input"]), 16) % HELD_OUT == 0 else "train"
        turns = [("user", example["input"].strip()), ("assistant", answer)]
        split[part].append({"messages": [{"role": role, "content": content} for role, content in turns]})
    for part, rows in split.items():
        _write(out / f"chat-{part}.jsonl", rows)


CHOICE_TASKS = {
    "social-iqa": "social_iqa",
    "fever": "fact_checker/fever",
    "wikihow-goal": "goal_step_wikihow/goal_inference",
    "wikihow-step": "goal_step_wikihow/step_inference",
}
"""By the name of the file that comes out."""


def convert_choices(packages: Sequence[Path], out: Path) -> None:
    """Questions with choices of which one is right, as they are in BIG-bench."""
    for name, task in CHOICE_TASKS.items():
        rows = []
        for example in _examples(packages, task):
            scores: dict[str, float] = example["target_scores"]
            right = [i for i, score in enumerate(scores.values()) if score == 1]
            if len(right) == 1 and len(scores) > 1:
                rows.append({"text": example["input"].strip(), "choices": list(scores), "label": right[0]})
        _write(out / f"{name}.jsonl", rows)


def _examples(packages: Sequence[Path], task: str) -> list[dict[str, Any]]:
    file = find_folder(packages, f"**/benchmark_tasks/{task}/task.json")
    examples: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["examples"]
    return examples


def _whole_subjects(rows: Sequence[tuple[str, str, str, str]], count: int) -> int:
    """The first place from `count` on where a new subject begins."""
    while 0 < count < len(rows) and rows[count][0] == rows[count - 1][0]:
        count += 1
    return min(count, len(rows))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
