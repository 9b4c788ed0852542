"""The router: equal rows get equal scores and the same experts, whoever shares the batch."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from factormix.nn import Router


def router(hidden: int, routed: int, active: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Router:
    made = Router(hidden, routed, active)
    with torch.no_grad():
        made.weight.copy_(torch.randn(routed, hidden, generator=torch.Generator().manual_seed(seed)))
    return made.to(dtype)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Router, Tensor, Tensor, int]:
    """A router, a row, mates of it, and the row's place among them."""
    hidden, routed = draw(st.integers(1, 200)), draw(st.integers(1, 24))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    seed, mates = draw(st.integers(0, 9999)), draw(st.integers(0, 150))
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(1, hidden, generator=generator)
    if draw(st.booleans()):  # cancelling terms of large size: the order of addition would show
        row *= 10.0 ** torch.randint(-4, 4, (1, hidden), generator=generator)
    others = torch.randn(mates, hidden, generator=generator)
    made = router(hidden, routed, draw(st.integers(1, routed)), seed, dtype)
    return made, row.to(dtype), others.to(dtype), draw(st.integers(0, mates))


@settings(max_examples=150, deadline=None)
@given(batches())
def test_batch_size_place_and_mates_change_nothing(case: tuple) -> None:
    made, row, others, place = case
    with torch.no_grad():
        alone, picked = made(row)
        scores, chosen = made(torch.cat([others[:place], row, others[place:]]))
    assert torch.equal(scores[place], alone[0])
    assert torch.equal(chosen[place], picked[0])


def test_float32_alone_would_not_do() -> None:
    """The premise: without the wider sum, some row's scores do depend on the batch (if not here, simplify Router)."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(512, 576, generator=generator), torch.randn(12, 576, generator=generator)
    together = torch.nn.functional.linear(x, weight)
    alone = torch.cat([torch.nn.functional.linear(x[i : i + 1], weight) for i in range(len(x))])
    exact = router(576, 12, 4)
    with torch.no_grad():
        exact.weight.copy_(weight)
        assert torch.equal(exact(x)[0], torch.cat([exact(x[i : i + 1])[0] for i in range(len(x))]))
    assert not torch.equal(together, alone)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.data())
def test_the_k_best_are_chosen_best_first(hidden: int, routed: int, data: st.DataObject) -> None:
    active = data.draw(st.integers(1, routed))
    made = router(hidden, routed, active)
    x = torch.randn(7, hidden, generator=torch.Generator().manual_seed(hidden))
    scores, chosen = made(x)
    assert scores.dtype == torch.float32 and chosen.shape == (7, active)
    assert torch.allclose(scores, x @ made.weight.T, atol=1e-4)
    assert torch.equal(scores.gather(1, chosen), scores.sort(1, descending=True).values[:, :active])


def test_autocast_does_not_reach_the_scores() -> None:
    made, x = router(64, 6, 2), torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    plain, _ = made(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, _ = made(x)
    assert torch.equal(scores, plain)


def test_zero_scores_are_ties_and_still_choose_distinct_experts() -> None:
    made = router(8, 6, 3)
    torch.nn.init.zeros_(made.weight)
    _, chosen = made(torch.randn(20, 8))
    assert all(len(set(row)) == 3 for row in chosen.tolist())


def test_gradients_reach_weight_and_input() -> None:
    made, x = router(8, 6, 3), torch.randn(4, 8, requires_grad=True)
    made(x)[0].square().sum().backward()
    assert float(made.weight.grad.norm()) > 0 and float(x.grad.norm()) > 0
