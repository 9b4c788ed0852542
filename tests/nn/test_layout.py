"""Layouts: both notations, and errors that show the arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factormix.nn import Layout
from factormix.run.errors import FactorMixError


@pytest.mark.parametrize(
    "text, want",
    [
        ("S4A4E16", (4, 4, 16)),
        ("s4a4e16", (4, 4, 16)),
        (" S0A2E4 ", (0, 2, 4)),
        ("1R4E2K", (0, 2, 4)),
        ("1r4e1k", (0, 1, 4)),
        ("S4A0E4", (4, 0, 4)),
        ("S3A13E16", (3, 13, 16)),
        ("S12A5E100", (12, 5, 100)),
        ("S8A0E16", (8, 0, 16)),
    ],
)
def test_both_notations(text: str, want: tuple[int, int, int]) -> None:
    layout = Layout.parse(text)
    assert (layout.shared, layout.active, layout.slices) == want


@given(st.integers(1, 200), st.data())
def test_what_is_printed_parses(slices: int, data: st.DataObject) -> None:
    shared = data.draw(st.integers(0, slices - 1))
    active = data.draw(st.integers(int(shared == 0), slices - shared))
    layout = Layout(shared, active, slices)
    assert Layout.parse(str(layout)) == layout
    assert (layout.routed, layout.dropped) == ((slices - shared, 0) if active else (0, slices - shared))
    assert layout.active_fraction == (shared + active) / slices <= 1
    if shared == 0:
        assert Layout.parse(f"1R{slices}E{active}K") == layout


@pytest.mark.parametrize(
    "text", ["", "S4A4", "4A4E16", "S4A4E16K2", "SxA4E16", "S-1A2E4", "R4E2K", "S4 A4 E16", "S1.5A2E4"]
)
def test_other_words_are_refused_with_both_forms(text: str) -> None:
    with pytest.raises(FactorMixError, match=r"not understood.*S4A4E16.*1R4E2K"):
        Layout.parse(text)


@pytest.mark.parametrize(
    "text, message",
    [
        ("S4A13E16", r"A = 13 experts.*R = E - S = 16 - 4 = 12; allowed: A from 0 to 12"),
        ("1R4E5K", r"A = 5 .*R = E - S = 4 - 0 = 4"),
        ("S5A1E4", r"S = 5 slices are to be shared of only E = 4"),
        ("S5A0E4", r"S = 5 .* of only E = 4"),
        ("S0A0E4", "runs nothing"),
        ("S0A0E0", "E must be at least 1"),
        ("2R4E2K", "2 routers; one router an FFN"),
    ],
)
def test_impossible_numbers_are_refused_with_the_arithmetic(text: str, message: str) -> None:
    with pytest.raises(FactorMixError, match=message):
        Layout.parse(text)


def test_a_width_that_does_not_divide_says_which_would() -> None:
    with pytest.raises(FactorMixError) as caught:
        Layout.parse("S4A4E16").width(1530)
    message = str(caught.value)
    assert "1530 neurons" in message and "E = 16" in message and "1530 / 16 = 95.62" in message
    named = [int(word) for word in message.rpartition("do: ")[2].strip(".").split(", ")]
    assert named == [10, 15, 17, 18] and all(1530 % e == 0 for e in named)


@given(st.integers(1, 5000), st.integers(1, 300))
def test_every_named_number_divides(inner: int, slices: int) -> None:
    layout = Layout(0, 1, slices)
    if inner % slices == 0:
        assert layout.width(inner) * slices == inner
        return
    with pytest.raises(FactorMixError) as caught:
        layout.width(inner)
    named = [int(word) for word in str(caught.value).rpartition("do: ")[2].strip(".").split(", ")]
    assert named and all(inner % e == 0 for e in named)
