"""The operator's tests are of the operator: with AVX2 alone it can serve any number of tokens, though PyTorch is
faster and takes most of them."""

from __future__ import annotations

import sys

import pytest

from factormix.experts import native


@pytest.fixture(autouse=True)
def any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    library = native.library()
    if library is not None and library.factormix_level(-1) == native.AVX512 - 1:
        monkeypatch.setattr(native, "most_tokens", lambda: sys.maxsize)
