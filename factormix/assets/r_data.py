"""Data frames of an R package, read without R: the lazy-load files Rdata.rdx (where what is) and Rdata.rdb (what).

Only what data frames of text, factors and numbers need of R's serialisation, XDR form, versions 2 and 3.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import zlib
from pathlib import Path
from typing import Any

from factormix.run.errors import FactorMixError

NA_INTEGER = -(2**31)
# Type codes of R's serialize.c
_SYMBOL, _PAIRS, _CHARS, _LOGICAL, _INTEGER, _REAL, _STRINGS, _LIST, _ALTREP = 1, 2, 9, 10, 13, 14, 16, 19, 238
_NOTHING = (254, 253, 242, 241)  # NULL, the global, empty and base environments
_REFERENCE = 255


class Vector(list[Any]):
    """An R vector with its attributes."""

    def __init__(self, items: list[Any]) -> None:
        super().__init__(items)
        self.attributes: dict[str, Any] = {}


def read_frame(folder: Path, name: str) -> dict[str, list[Any]]:
    """A data frame of a package's ``data`` folder as columns; factors become their labels, missing values None.

    Raises:
        FactorMixError: no such object, or one that is no data frame.
    """
    index = _Reader(gzip.decompress((folder / "Rdata.rdx").read_bytes())).read()
    variables = _named(_named(index)["variables"])
    if name not in variables:
        raise FactorMixError(f"{str(folder)!r} has no data set {name!r}; it has {', '.join(variables)}.")
    offset, length = variables[name]
    with open(folder / "Rdata.rdb", "rb") as file:
        file.seek(offset)
        packed = file.read(length)
    frame = _Reader(_unpacked(packed)).read()
    if not isinstance(frame, Vector) or "names" not in frame.attributes:
        raise FactorMixError(f"{name!r} of {str(folder)!r} is no data frame.")
    return {column: _column(values) for column, values in _named(frame).items()}


def _named(values: Vector) -> dict[str, Any]:
    return dict(zip(values.attributes["names"], values))


def _column(values: Vector) -> list[Any]:
    levels = values.attributes.get("levels")
    if levels is None:
        return list(values)
    return [None if code is None else levels[code - 1] for code in values]


def _unpacked(packed: bytes) -> bytes:
    """Four bytes of length, then zlib's bytes, or the letter of another compression (R's R_decompress3) and its."""
    letter = packed[4:5]
    if letter == b"2":
        return bz2.decompress(packed[5:])
    if letter == b"Z":
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 6 | lzma.PRESET_EXTREME}]
        return lzma.decompress(packed[5:], lzma.FORMAT_RAW, filters=filters)
    return zlib.decompress(packed[4:])


class _Reader:
    """A cursor over serialised bytes."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        if data[:2] != b"X\n":
            raise FactorMixError("not R's XDR serialisation; the package's layout has changed.")
        self.at = 2
        version, _, _ = self.integers(3)
        if version == 3:
            self.take(self.integers(1)[0])  # the encoding's name
        self.references: list[Any] = []

    def take(self, count: int) -> bytes:
        self.at += count
        return self.data[self.at - count : self.at]

    def integers(self, count: int) -> tuple[int, ...]:
        return struct.unpack(f">{count}i", self.take(4 * count))

    def read(self) -> Any:
        """The next object: None, str, a list of pairs as dict, or a Vector."""
        (flags,) = self.integers(1)
        kind, attributed, tagged = flags & 255, bool(flags & 0x200), bool(flags & 0x400)
        if kind in _NOTHING:
            return None
        if kind == _REFERENCE:
            return self.references[(flags >> 8 or self.integers(1)[0]) - 1]
        if kind == _SYMBOL:
            self.references.append(self.read())
            return self.references[-1]
        if kind == _CHARS:
            (length,) = self.integers(1)
            return None if length == -1 else self.take(length).decode("utf-8", "replace")
        if kind == _PAIRS:
            return self.pairs(attributed, tagged)
        if kind == _ALTREP:
            return self.compact()
        vector = Vector(self.items(kind))
        if attributed:
            vector.attributes = self.read()
        return vector

    def pairs(self, attributed: bool, tagged: bool) -> dict[str, Any]:
        """A pairlist; R writes it as a chain."""
        if attributed:
            self.read()
        tag = self.read() if tagged else ""
        head = self.read()
        return {tag: head, **(self.read() or {})}

    def items(self, kind: int) -> list[Any]:
        (length,) = self.integers(1)
        if kind in (_INTEGER, _LOGICAL):
            return [None if v == NA_INTEGER else v for v in self.integers(length)]
        if kind == _REAL:
            return list(struct.unpack(f">{length}d", self.take(8 * length)))
        if kind in (_STRINGS, _LIST):
            return [self.read() for _ in range(length)]
        raise FactorMixError(f"R type {kind} is not read here; the package's data has changed.")

    def compact(self) -> Vector:
        """R's short form of a vector: of a sequence its length, start and step; of a wrapped one the vector itself."""
        info, state, attributes = self.read(), self.read(), self.read()
        name = next(iter(info.values()))
        if name in ("compact_intseq", "compact_realseq"):
            length, start, step = state
            vector = Vector([start + step * i for i in range(int(length))])
        else:
            vector = Vector(list(state[0] if isinstance(state, Vector) else next(iter(state.values()))))
        vector.attributes = attributes or {}
        return vector
