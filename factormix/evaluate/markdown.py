"""Write numbers and tables in Markdown, in the same form in every report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table. Characters that would break a cell are escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(head), "|" + " --- |" * len(head), *(line(row) for row in rows)]


def times(value: float | None) -> str:
    """A ratio as "× 1.23", or a dash for None."""
    return "–" if value is None else f"× {value:.2f}"


def number(value: float | None) -> str:
    """A number with four significant digits, without an exponent below ten million; a dash for None."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def size(count: int | None) -> str:
    """Bytes as MiB or GiB; "" for None or 0."""
    return f"{count / 2**30:.2f} GiB" if count and count >= 2**30 else f"{count / 2**20:.0f} MiB" if count else ""
