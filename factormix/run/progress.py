"""Progress bars and messages, on stderr: stdout belongs to results."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

T = TypeVar("T")

LOG_SECONDS = 15.0  # between lines when stderr is a file


def progress(iterable: Iterable[T], label: str, total: int | None = None, quiet: bool = False) -> Iterator[T]:
    """The items of `iterable`, with a bar on stderr (a line now and then when stderr is not a terminal).

    Args:
        iterable: what to go through.
        label: what is being done, in a word or two.
        total: the number of items when `iterable` has no length.
        quiet: show nothing.
    """
    return iter(
        tqdm(iterable, desc=label, total=total, disable=quiet, file=sys.stderr, mininterval=_interval(), leave=False)
    )


def bar(label: str, total: int, quiet: bool = False) -> tqdm:  # type: ignore[type-arg, unused-ignore]
    """A bar on stderr to be moved by hand; `update(0)` shows a new postfix, no oftener than a bar is drawn."""
    return tqdm(
        total=total, desc=label, disable=quiet, file=sys.stderr, mininterval=_interval(), miniters=0, leave=False
    )


def _interval() -> float:
    """Seconds between two drawings of a bar."""
    return 0.1 if sys.stderr.isatty() else LOG_SECONDS


def say(message: str, quiet: bool = False) -> None:
    """Print one message on stderr, above a running bar, unless `quiet`."""
    if not quiet:
        tqdm.write(message, file=sys.stderr)
