"""Multiple-choice questions made from what is at hand: labelled text, and plain text.

    from_labels(read_labelled("reviews.jsonl"))          # which class?
    next_sentences(documents.texts, count=500)           # which sentence comes next?

A question is ``{"text": str, "choices": [str, ...], "label": int}``, the right choice from 0: what `data.labelled`
calls multiple choice, and what the tasks of evaluate/choice_tasks ask.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from factormix.data.labelled import Labelled
from factormix.run.errors import FactorMixError

Question = dict[str, Any]

CONTEXT_WORDS = 40  # a next-sentence question shows so many words or a few more
CHOICE_WORDS = (8, 40)  # length of a sentence that may be a choice
CHOICES = 4
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")


def from_labels(
    examples: Labelled,
    names: Mapping[str, str] | None = None,
    offered: int | None = None,
    count: int | None = None,
    seed: int = 0,
) -> list[Question]:
    """Which class has the text? Classes in turn, so that every class is asked equally often while it lasts.

    Args:
        examples: of kind "single-label", or "multiple-choice", whose choices are taken as they are.
        names: how each label is written as a choice; by default as it is.
        offered: choices of a question: the right one and others drawn from the classes; None offers all of them.
        count: at most so many questions.
        seed: of which questions, and of the choices offered.

    Raises:
        FactorMixError: another kind of labels, or a label that `names` does not know.
    """
    draw = random.Random(seed)
    if examples.kind == "multiple-choice" and examples.choices is not None and examples.labels is not None:
        rows = zip(examples.texts, examples.choices, examples.labels)
        asked = [{"text": text, "choices": choices, "label": label} for text, choices, label in rows]
        draw.shuffle(asked)
        return asked[:count]
    if examples.kind != "single-label" or examples.labels is None:
        raise FactorMixError(
            f"{examples.name} is {examples.kind or 'unlabelled'}; questions need one label a text, or choices."
        )
    classes = examples.classes()
    unnamed = [label for label in classes if names is not None and label not in names]
    if unnamed:
        raise FactorMixError(f"{examples.name} has the label {unnamed[0]!r}, for which the task names no choice.")
    found = []
    for i in _in_turn(examples.labels, draw)[:count]:
        label, others = examples.labels[i], [each for each in classes if each != examples.labels[i]]
        few = classes if offered is None else draw.sample([label, *draw.sample(others, offered - 1)], offered)
        choices = [each if names is None else names[each] for each in few]
        found.append({"text": examples.texts[i], "choices": choices, "label": few.index(label)})
    return found


def next_sentences(texts: Sequence[str], count: int, seed: int = 0) -> list[Question]:
    """Which sentence comes next? The true one, and three that come next elsewhere in the texts.

    Raises:
        FactorMixError: too few sentences.
    """
    draw = random.Random(seed)
    pairs = [pair for text in texts for pair in _pairs(text)]  # (context, the sentence after it)
    draw.shuffle(pairs)
    following = sorted({sentence for _, sentence in pairs})
    if len(following) < CHOICES:
        raise FactorMixError(f"the text gives {len(following)} sentences to choose from; {CHOICES} are needed.")
    found = []
    for context, right in pairs[:count]:
        wrong = [each for each in draw.sample(following, CHOICES) if each != right][: CHOICES - 1]
        choices = draw.sample([right, *wrong], CHOICES)
        found.append({"text": context, "choices": choices, "label": choices.index(right)})
    return found


def _in_turn(labels: Sequence[str], draw: random.Random) -> list[int]:
    """Numbers of the examples, shuffled, a class after another."""
    by_class: dict[str, list[int]] = {}
    for i in draw.sample(range(len(labels)), len(labels)):
        by_class.setdefault(labels[i], []).append(i)
    lists = [by_class[label] for label in sorted(by_class)]
    longest = max(map(len, lists))
    return [of[turn] for turn in range(longest) for of in lists if turn < len(of)]


def _pairs(text: str) -> list[tuple[str, str]]:
    sentences = [each.strip() for each in _SENTENCE_END.split(" ".join(text.split()))]
    found: list[tuple[str, str]] = []
    context: list[str] = []
    for sentence in sentences:
        words = len(sentence.split())
        if sum(len(each.split()) for each in context) >= CONTEXT_WORDS:
            if CHOICE_WORDS[0] <= words <= CHOICE_WORDS[1] and sentence[-1] in ".!?":
                found.append((" ".join(context), sentence))
            context = []
        else:
            context.append(sentence)
    return found
