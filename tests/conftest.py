"""What all tests share: one torch thread (so small a model makes a second wait), a seed, and no downloads unasked."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported; without Triton, nobody does


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--download", action="store_true", help="also run the tests that fetch real models and text")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "download: fetches from package registries; needs --download")
    torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.manual_seed(0)  # each test's own, so that none depends on what ran before it


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--download"):
        return
    skip = pytest.mark.skip(reason="fetches from package registries; run with --download")
    for item in items:
        if item.get_closest_marker("download"):
            item.add_marker(skip)
