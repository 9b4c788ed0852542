"""Mutual information of expert and text: right by hand, found where planted, near chance where there is nothing."""

import math

import pytest
import torch

from factormix.show.information import expert_information, mutual_information, serving
from factormix.show.pieces import Token
from factormix.show.trace import SiteTrace, Trace


def traced(chances: torch.Tensor, documents: int = 6, length: int = 100, seed: int = 0) -> Trace:
    """Two texts of `documents` documents; chances (2, R) of each text's experts, one chosen a token."""
    generator = torch.Generator().manual_seed(seed)
    tokens, rows = [], []
    for document in range(2 * documents):
        for _ in range(length):
            tokens.append(Token(0, "w", "", "w", "word", document))
            rows.append(int(torch.multinomial(chances[document // documents], 1, generator=generator)))
    weights = torch.nn.functional.one_hot(torch.tensor(rows), chances.shape[1]).float()
    site = SiteTrace("layer 0", "x", "experts", "hard", tuple(map(str, range(chances.shape[1]))), weights)
    names = tuple(f"{'ab'[d // documents]} {d}" for d in range(2 * documents))
    return Trace(tuple(tokens), names, tuple("ab"[d // documents] for d in range(2 * documents)), (site,), True)


def test_bits_by_hand():
    assert float(mutual_information(torch.tensor([[5.0, 0.0], [0.0, 5.0]]))) == pytest.approx(1.0)
    assert float(mutual_information(torch.tensor([[2.0, 4.0], [3.0, 6.0]]))) == pytest.approx(0.0, abs=1e-12)
    by_hand = 0.5 * (0.75 * math.log2(0.75 / 0.5) + 0.25 * math.log2(0.25 / 0.5)) * 2
    assert float(mutual_information(torch.tensor([[3.0, 1.0], [1.0, 3.0]]))) == pytest.approx(by_hand)


def test_a_planted_expert_is_found_and_its_text_named():
    found = expert_information(traced(torch.tensor([[0.6, 0.2, 0.2], [0.2, 0.2, 0.6]])))
    site = found["layer 0"]
    assert site.p < 0.01 and site.bits > 5 * site.shuffled
    assert site.lift[0].argmax() == 0 and site.lift[1].argmax() == 2
    ((name, text, expert, lift),) = serving(found, ["a", "b"])
    assert (name, (text, expert) in {("a", 0), ("b", 2)}) == ("layer 0", True) and 1.3 < lift < 1.7


def test_nothing_planted_is_chance_even_where_documents_differ():
    """Each document prefers an expert of its own: much information about documents, none about texts."""
    assert expert_information(traced(torch.tensor([[0.3, 0.3, 0.4], [0.3, 0.3, 0.4]])))["layer 0"].p > 0.05
    levels = []
    for seed in range(8):
        found = traced(torch.full((2, 3), 1 / 3), documents=4, seed=seed)
        own = torch.randint(3, (8,), generator=torch.Generator().manual_seed(seed))
        document = torch.tensor([token.document for token in found.tokens])
        weights = torch.nn.functional.one_hot(own[document], 3).float()
        site = SiteTrace("layer 0", "x", "experts", "hard", ("0", "1", "2"), weights)
        levels.append(expert_information(Trace(found.tokens, found.documents, found.texts, (site,), True))["layer 0"])
    assert sum(level.shuffled for level in levels) / 8 > 0.02  # by chance alone, and the shuffles say so
    assert sum(level.p < 0.05 for level in levels) <= 1


def test_one_text_has_no_information():
    found = traced(torch.full((2, 3), 1 / 3))
    assert expert_information(Trace(found.tokens, found.documents, ("a",) * 12, found.sites, True)) == {}
