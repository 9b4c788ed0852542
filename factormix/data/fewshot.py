"""K-shot samples of labelled text: K examples of each class to train on, another K to develop on (MixDA, section 4.1).

Seeded and stratified. What a class is depends on the kind of task:

===============  ==============================================================================
single-label     a label
multi-label      a label, or "no label"; an example counts for each of its labels
regression       one of `bins` ranges of the target, as equally filled as the values allow
multiple-choice  all examples together: the number of the right choice means nothing
===============  ==============================================================================

The released code sampled regression targets as if each value were a class; here they are binned first.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Hashable, Sequence
from typing import Any

from factormix.data.labelled import Labelled
from factormix.run.errors import FactorMixError

BINS = 5  # of regression targets
NO_LABEL = "(no label)"


def few_shot(
    examples: Labelled, shots: int, seed: int, dev: Labelled | None = None, bins: int = BINS
) -> tuple[Labelled, Labelled]:
    """A K-shot training set and a K-shot development set that share no example and no text.

    Args:
        examples: what is drawn from.
        shots: K, 1 or more.
        seed: of the draw; the training set does not depend on `dev`.
        dev: where the development set is drawn from; by default from `examples`, what training left.
        bins: ranges of regression targets.

    Returns:
        (train, dev), each in random order. Of a multi-label task a set holds at least K examples of each label, more of
        labels that come along with rarer ones.

    Raises:
        FactorMixError: no labels, shots or bins below 1, or a class with too few examples, all of them named.
    """
    for what, value in (("shots", shots), ("bins", bins)):
        if value < 1:
            raise FactorMixError(f"{what} received {value}; allowed: at least 1.")
    edges = _edges(examples, bins)
    train = _draw(examples, shots, random.Random(f"train {seed}"), edges, set(), "training", dev is None)
    used = {examples.texts[i] for i in train}
    source = examples if dev is None else dev
    held = _draw(source, shots, random.Random(f"dev {seed}"), edges, used, "development", dev is None)
    return examples.take(train), source.take(held)


def _edges(examples: Labelled, bins: int) -> list[float]:
    """Inner edges of the ranges of regression targets, between different values; empty for other kinds."""
    if examples.kind != "regression" or not examples.labels:
        return []
    values = sorted(examples.labels)
    cuts = {values[len(values) * i // bins] for i in range(1, bins)}
    return sorted(cut for cut in cuts if cut > values[0])


def _strata(examples: Labelled, edges: Sequence[float]) -> list[tuple[Hashable, ...]]:
    """The classes of each example."""
    if examples.labels is None:
        raise FactorMixError(f"{examples.name} has no labels to sample by.")
    if examples.kind == "regression":
        return [(bisect.bisect_right(edges, value),) for value in examples.labels]
    if examples.kind == "multiple-choice":
        return [("examples",)] * len(examples)
    if examples.kind == "multi-label":
        return [labels or (NO_LABEL,) for labels in examples.labels]
    return [(label,) for label in examples.labels]


def _draw(
    examples: Labelled,
    shots: int,
    draw: random.Random,
    edges: Sequence[float],
    used: set[str],
    what: str,
    shared: bool,
) -> list[int]:
    """Numbers of the drawn examples; none has a text in `used`, and no text comes twice."""
    strata = _strata(examples, edges)
    order = list(range(len(examples)))
    draw.shuffle(order)
    free, texts = [], set(used)
    for i in order:
        if examples.texts[i] not in texts:
            texts.add(examples.texts[i])
            free.append(i)
    classes: dict[Hashable, list[int]] = {each: [] for row in strata for each in row}
    for i in free:
        for each in strata[i]:
            classes[each].append(i)
    _refuse_small(classes, shots, what, examples, edges, shared)
    chosen: list[int] = []
    filled = dict.fromkeys(classes, 0)
    taken: set[int] = set()
    for each in sorted(classes, key=lambda c: (len(classes[c]), str(c))):  # rare labels first: they fill common ones
        for i in classes[each]:
            if filled[each] >= shots:
                break
            if i not in taken:
                taken.add(i)
                chosen.append(i)
                for also in strata[i]:
                    filled[also] += 1
    draw.shuffle(chosen)
    return chosen


def _refuse_small(
    classes: dict[Hashable, list[int]],
    shots: int,
    what: str,
    examples: Labelled,
    edges: Sequence[float],
    shared: bool,
) -> None:
    small = {each: len(rows) for each, rows in classes.items() if len(rows) < shots}
    if not small:
        return
    listed = ", ".join(f"{_name(each, edges)} has {count}" for each, count in sorted(small.items(), key=str))
    left = " that training left" if shared and what == "development" else ""
    remedy = "ask for fewer --shots, or give a --dev file" if left else "ask for fewer --shots, or give more examples"
    raise FactorMixError(
        f"{examples.name}: {shots} {what} examples a class{left} are not to be had: {listed} (each text counts once). "
        f"Please {remedy}."
    )


def _name(each: Any, edges: Sequence[float]) -> str:
    if not edges or not isinstance(each, int):
        return repr(each)
    low = "-inf" if each == 0 else f"{edges[each - 1]:g}"
    high = "inf" if each == len(edges) else f"{edges[each]:g}"
    return f"range [{low}, {high})"
