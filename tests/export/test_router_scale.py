"""Routers scaled for a container choose the same experts and weigh them evenly; m is the cheaper of two errors."""

from __future__ import annotations

import pytest
import torch

from factormix.export.router_scale import M, RouterScale, choose_m, measure_router_scale
from factormix.export.scoring import Scoring, flipped, top
from tests.export.tiny import factored, windows

SCORINGS = [
    Scoring("topk"),
    Scoring("softmax"),
    Scoring("softmax", renormalised=False),
    Scoring("sigmoid", scale=3.0),
]


@pytest.mark.parametrize("scoring", SCORINGS, ids=str)
def test_small_logits_give_even_weights_that_the_gain_makes_one(scoring: Scoring) -> None:
    logits = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))  # (T, R)
    chosen = top(logits, 3)  # (T, K)
    weights = scoring.weights(logits * 2.0**-13, chosen) * scoring.gain(3, 12)
    assert torch.allclose(weights, torch.ones(50, 3), atol=1e-3)


def test_a_raw_sigmoid_is_the_soft_gate() -> None:
    raw = Scoring("sigmoid", renormalised=False)
    logits = torch.tensor([[3.0, -1.0, 0.0]])
    assert raw.raw and raw.gain(2, 3) == 1
    assert torch.equal(raw.weights(logits, torch.tensor([[0, 2]])), logits[:, [0, 2]].sigmoid())


def test_rows_lose_their_mean_and_keep_their_order_exactly() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)) + 5  # a large common row
    scale = RouterScale(12, (3,), {}, {}, (1.0,))
    rows = scale.rows(weight, 0)
    assert float(rows.double().mean(0).abs().max()) < 1e-9
    exact = (weight.double() - weight.double().mean(0)).float()
    assert torch.equal(rows, exact * 2.0 ** (3 - 12))  # a power of two: no bit is lost
    x = torch.randn(100, 32, dtype=torch.float64)
    assert not flipped(top(x @ weight.double().T, 3), top(x @ rows.double().T, 3)).any()


def test_measured_spread_is_about_one_and_m_is_the_cheapest() -> None:
    model = factored("llama")
    for ffn, factor in zip(model.sparse_ffns().values(), (100.0, 0.01)):
        ffn.router.weight.data *= factor
    scale = measure_router_scale(model, windows(), Scoring("softmax"), quiet=True)
    assert scale.m in M and scale.exponents[1] - scale.exponents[0] in range(10, 17)  # 10^4 is 2^13.3
    deviations = [scale.deviations[m] for m in M]
    assert deviations == sorted(deviations, reverse=True)
    assert deviations[0] / deviations[-1] == pytest.approx(16, rel=0.1)


@pytest.mark.parametrize(
    ("flips", "deviations", "m"),
    [
        ((0, 0, 0, 0, 0), (8e-4, 4e-4, 2e-4, 1e-4, 5e-5), 14),
        ((1e-4, 2e-4, 4e-4, 8e-4, 2e-3), (8e-4, 4e-4, 2e-4, 1e-4, 5e-5), 12),
        ((1e-3, 2e-3, 4e-3, 8e-3, 2e-2), (8e-4, 4e-4, 2e-4, 1e-4, 5e-5), 10),
    ],
)
def test_choose_m(flips: tuple[float, ...], deviations: tuple[float, ...], m: int) -> None:
    assert choose_m(dict(zip(M, flips)), dict(zip(M, deviations))) == m


def test_ties_of_float32_are_counted() -> None:
    """Two experts closer than float32's softmax can tell are chosen by chance."""
    from factormix.export.router_scale import _cost

    close = 1e-5 * torch.randn(1000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = torch.cat([0.5 + close, torch.full((1000, 1), 0.5), torch.full((1000, 1), -1.0)], dim=1)  # (T, R)
    assert _cost(logits, 1, Scoring("softmax"))[0] < 0.02
    assert 0.3 < _cost(logits * 2.0**-13, 1, Scoring("softmax"))[0] < 0.7


def test_a_soft_gate_is_measured_by_its_mean() -> None:
    model = factored("llama", gate="soft")
    scale = measure_router_scale(model, windows(), Scoring("sigmoid", renormalised=False), quiet=True)
    assert scale.m is None and all(0.5 < mean < 1 for mean in scale.means)
    weight = model.sparse_ffns()[0].router.weight
    assert torch.equal(scale.rows(weight, 0), weight)
