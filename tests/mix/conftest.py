"""What the tests of stage 2 share: the toy world's tokenizer, made once a file."""

from __future__ import annotations

from typing import Any

import pytest

from tests.mix.toy import tokenizer


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tokenizer(tmp_path_factory.mktemp("words"))
