"""Layouts that other engines take too: what to choose when a model is to be exported one day."""

from __future__ import annotations

from collections.abc import Iterable

from factormix.nn import Layout

WIDTH_MULTIPLE = 32  # quantised formats pack weights in blocks of 32
MOST_SLICES = 256


def export_advice(layout: Layout, inner: Iterable[int]) -> str | None:
    """A sentence when other engines may refuse `layout` on FFNs of these widths I, else None.

    Their kernels want a power of two of routed experts, and an expert width in whole blocks of 32.
    """
    widths = sorted(set(inner))
    problems = []
    if layout.routed & (layout.routed - 1):
        problems.append(f"{layout.routed} routed experts are no power of two")
    odd = [layout.width(i) for i in widths if layout.width(i) % WIDTH_MULTIPLE]
    if layout.routed and odd:
        problems.append(f"an expert width of {odd[0]} is no multiple of {WIDTH_MULTIPLE}")
    if not problems:
        return None
    other = nearest_exportable(layout, widths)
    if other is None:
        remedy = "no layout of the same active fraction is better"
    else:
        width = other.width(widths[0])
        remedy = f"{other} runs as many neurons, with {other.routed} routed experts of width {width}"
    return f"layout {layout}: {' and '.join(problems)}, which other engines may refuse to import; {remedy}."


def nearest_exportable(layout: Layout, inner: Iterable[int]) -> Layout | None:
    """The layout of the same active fraction that other engines take, as near to `layout` as there is."""
    widths = list(inner)
    fitting = []
    for slices in range(2, MOST_SLICES + 1):
        active = (layout.shared + layout.active) * slices
        if active % layout.slices or any(i % (slices * WIDTH_MULTIPLE) for i in widths):
            continue
        running = active // layout.slices
        for shared in range(running):
            routed = slices - shared
            if routed & (routed - 1) == 0 and running - shared <= routed:
                fitting.append(Layout(shared, running - shared, slices))
    share = layout.shared / layout.slices
    return min(
        fitting,
        key=lambda x: (
            round(abs(x.shared / x.slices - share), 6), abs(x.active - layout.active), abs(x.slices - layout.slices)
        ),
        default=None,
    )  # fmt: skip
