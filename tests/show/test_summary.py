"""The numbers, against arithmetic done by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from factormix.show.summary import entropy, summarise
from factormix.show.trace import Trace


def test_loads_of_experts(small: Trace) -> None:
    site = summarise(small)["sites"][0]
    assert site["active"] == 2 and site["mean"] == [0.8333, 0.6667, 0.5]
    share = [5 / 12, 4 / 12, 3 / 12]
    assert site["entropy"] == pytest.approx(-sum(p * math.log2(p) for p in share), abs=1e-3)
    assert site["entropy_max"] == pytest.approx(math.log2(3), abs=1e-4)
    assert site["by"]["document"] == [[1.0, 0.5, 0.5], [0.5, 1.0, 0.5]]
    assert site["by"]["document"] == site["by"]["text"]  # each text is one document here
    assert site["by"]["kind"][0] == [0.5, 1.0, 0.5]  # the words: tokens 0 and 4


def test_weights_of_domains(small: Trace) -> None:
    found = summarise(small)
    assert found["sites"][2]["active"] is None
    assert found["sites"][2]["mean"] == [pytest.approx(5.5 / 6, abs=1e-4), pytest.approx(3.25 / 6, abs=1e-4)]
    assert found["sites"][2]["by"]["document"] == [[1.25, 0.75], [0.25, 0.125]]
    everywhere = found["domains"]
    assert everywhere["mean"] == [pytest.approx(8.75 / 12, abs=1e-4)] * 2 and everywhere["entropy"] == 1.0
    assert everywhere["by"]["document"] == [[1.0, 1.0], [0.1875, 0.1875]]


def test_groups(small: Trace) -> None:
    assert summarise(small)["groups"] == {
        "text": [{"name": "one", "tokens": 4}, {"name": "two", "tokens": 2}],
        "document": [{"name": "first", "tokens": 4}, {"name": "second", "tokens": 2}],
        "kind": [
            {"name": "word", "tokens": 2},
            {"name": "punctuation", "tokens": 2},
            {"name": "space", "tokens": 1},
            {"name": "special", "tokens": 1},
        ],
    }


def test_a_document_without_tokens_has_no_average(small: Trace) -> None:
    more = replace(small, documents=("first", "second", "third"), texts=("one", "two", "two"))
    assert summarise(more)["sites"][0]["by"]["document"][2] is None


def test_no_mean_over_sites_with_other_domains_nor_over_experts(small: Trace) -> None:
    other = replace(small.sites[3], columns=("law", "sport"))
    assert summarise(replace(small, sites=(*small.sites[:3], other)))["domains"] is None
    assert summarise(replace(small, sites=small.sites[:2]))["domains"] is None


def test_it_is_json(small: Trace) -> None:
    assert json.loads(json.dumps(summarise(small), allow_nan=False)) == summarise(small)


def test_entropy() -> None:
    assert entropy(torch.tensor([1.0, 1, 1, 1])) == pytest.approx(2.0)
    assert entropy(torch.tensor([3.0, 0])) == 0.0 and str(entropy(torch.tensor([3.0, 0]))) == "0.0"
    assert entropy(torch.zeros(3)) == 0.0
