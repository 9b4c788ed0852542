"""The one error a user sees, and the two helpers that make its message useful."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


class FactorMixError(ValueError):
    """Something the user can put right: the message holds the value received, what is allowed and the remedy."""


def nearest(name: object, allowed: Iterable[object]) -> str:
    """``" Did you mean 'x'?"`` for the allowed name closest to `name` (case ignored), or ``""`` when none is close."""
    by_lower = {str(option).lower(): str(option) for option in allowed}
    close = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.6)
    return f" Did you mean {by_lower[close[0]]!r}?" if close else ""


def choose(what: str, value: T, allowed: Iterable[T]) -> T:
    """Return `value` when it is one of `allowed`; else raise with the value, all that is allowed and the nearest.

    Args:
        what: what is being chosen, as the user knows it ("gate", "partition method").
        value: the value received.
        allowed: the values accepted; a mapping counts by its keys.
    """
    options = list(allowed)
    if value in options:
        return value
    listed = ", ".join(repr(option) for option in options) or "nothing"
    raise FactorMixError(f"unknown {what} {value!r}; allowed: {listed}.{nearest(value, options)}")
