"""Layout: how an FFN is cut, in both notations.

``S4A4E16``: E = 16 slices, S = 4 of them shared (always on), A = K = 4 of the other R = 12 chosen for each token.
``S8A0E16``: nothing is routed: 8 of 16 slices stay and the others are dropped. Static pruning, the baseline to beat.
``1R4E2K`` (FactorLLM's own): one router, 4 experts, top 2; the same as ``S0A2E4``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from factormix.run.errors import FactorMixError

FORMS = "'S<shared>A<active>E<slices>' such as S4A4E16, or the paper's '1R<experts>E<active>K' such as 1R4E2K"


@dataclass(frozen=True)
class Layout:
    """E slices, S shared, K of the R = E - S routed ones run for a token. With K = 0 the others are dropped.

    Raises:
        FactorMixError: numbers that cannot be, with the arithmetic.
    """

    shared: int
    active: int
    slices: int

    def __post_init__(self) -> None:
        if self.slices < 1 or self.shared < 0 or self.active < 0:
            raise FactorMixError(f"layout {self}: E must be at least 1, S and A at least 0.")
        if self.shared + self.active == 0:
            raise FactorMixError(f"layout {self} runs nothing: S + A must be at least 1.")
        if self.shared > self.slices:
            raise FactorMixError(f"layout {self}: S = {self.shared} slices are to be shared of only E = {self.slices}.")
        if self.active > self.slices - self.shared:
            raise FactorMixError(
                f"layout {self}: A = {self.active} experts are to be chosen of R = E - S = {self.slices} - "
                f"{self.shared} = {self.slices - self.shared}; allowed: A from 0 to {self.slices - self.shared}."
            )

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Read either notation, upper or lower case.

        Raises:
            FactorMixError: not a layout; both forms are shown.
        """
        word = str(text).strip().upper()
        if match := re.fullmatch(r"S(\d+)A(\d+)E(\d+)", word):
            shared, active, slices = map(int, match.groups())
            return cls(shared, active, slices)
        if match := re.fullmatch(r"(\d+)R(\d+)E(\d+)K", word):
            routers, experts, active = map(int, match.groups())
            if routers != 1:
                raise FactorMixError(f"layout {text!r}: {routers} routers; one router an FFN is all there is (1R...).")
            return cls(0, active, experts)
        raise FactorMixError(f"layout {text!r} is not understood. Write {FORMS}.")

    @property
    def routed(self) -> int:
        """R, the number of experts a router chooses from."""
        return self.slices - self.shared if self.active else 0

    @property
    def dropped(self) -> int:
        """Slices that are gone: those of static pruning."""
        return self.slices - self.shared - self.routed

    @property
    def active_fraction(self) -> float:
        """(S + K) / E, the part of the neurons that run for a token."""
        return (self.shared + self.active) / self.slices

    def with_active(self, count: int) -> Layout:
        """The layout of as many slices with `count` of them active, shared ones in the same proportion; all of them
        shared where all are active."""
        if count == self.slices or not self.active:
            return Layout(count, 0, self.slices)
        shared = round(count * self.shared / (self.shared + self.active))
        return Layout(min(shared, count - 1), count - min(shared, count - 1), self.slices)

    def width(self, inner: int) -> int:
        """W = I / E.

        Raises:
            FactorMixError: I does not divide; says which E would.
        """
        if inner % self.slices:
            fits = [e for e in range(1, min(inner, 256) + 1) if inner % e == 0]
            near = sorted(fits, key=lambda e: (abs(e - self.slices), e))[:4]
            raise FactorMixError(
                f"layout {self}: an FFN of {inner} neurons does not divide into E = {self.slices} equal slices "
                f"({inner} / {self.slices} = {inner / self.slices:.2f}). Nearest E that do: "
                f"{', '.join(map(str, sorted(near)))}."
            )
        return inner // self.slices

    def __str__(self) -> str:
        return f"S{self.shared}A{self.active}E{self.slices}"
