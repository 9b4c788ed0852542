"""Labels against brute force and against their formulas."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from factormix.factor import labels as module
from factormix.factor.labels import Labels, label, top_k_hot

METHODS = ["joint", "contribution", "paper", "random"]


def problem(tokens: int, routed: int, hidden: int, seed: int = 0, spread: float = 0.5) -> tuple[Tensor, Tensor]:
    """Expert outputs (T, R, H) that have something in common, and their sum (T, H) with a rest."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(tokens, 1, hidden, generator=g)
    size = torch.rand(tokens, routed, 1, generator=g) + 0.1
    outputs = size * (torch.randn(tokens, routed, hidden, generator=g) + spread * common)
    return outputs, outputs.sum(1)


def residual(found: Labels, outputs: Tensor, target: Tensor) -> Tensor:
    """|target - sum of the label's experts|^2, (T,)."""
    return (target - (found.chosen.unsqueeze(-1) * outputs).sum(1)).square().sum(-1)


def best(outputs: Tensor, target: Tensor, active: int) -> Tensor:
    """The smallest residual over all subsets, one by one, (T,)."""
    subsets = itertools.combinations(range(outputs.shape[1]), active)
    return torch.stack([(target - outputs[:, list(s)].sum(1)).square().sum(-1) for s in subsets]).min(0).values


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=30, deadline=None)
@given(data=st.data(), seed=st.integers(0, 999))
def test_k_experts_a_token(method: str, data: st.DataObject, seed: int) -> None:
    routed = data.draw(st.integers(1, 14))
    active = data.draw(st.integers(1, routed))
    outputs, target = problem(5, routed, data.draw(st.integers(1, 9)), seed)
    found = label(method, outputs, target, active)
    assert found.chosen.shape == found.gain.shape == (5, routed)
    assert set(found.chosen.unique().tolist()) <= {0.0, 1.0}
    assert found.chosen.sum(1).tolist() == [active] * 5


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(0, 9999))
def test_joint_is_the_best_subset(data: st.DataObject, seed: int) -> None:
    routed = data.draw(st.integers(1, 8))  # 8 choose 4 = 70 subsets: looked for among all
    active = data.draw(st.integers(1, routed))
    outputs, target = problem(6, routed, 7, seed)
    got, want = residual(label("joint", outputs, target, active), outputs, target), best(outputs, target, active)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(st.integers(9, 12), st.integers(3, 5), st.integers(0, 9999))
def test_greedy_is_close_to_the_best_on_average(routed: int, active: int, seed: int) -> None:
    outputs, target = problem(24, routed, 10, seed)
    outputs, target = outputs.double(), target.double()
    got = residual(greedy(outputs, target, active), outputs, target)
    want, none = best(outputs, target, active), target.square().sum(-1)
    assert bool((got >= want - 1e-9).all())
    assert float((none - got).sum() / (none - want).sum()) > 0.95  # of what can be explained


def greedy(outputs: Tensor, target: Tensor, active: int) -> Labels:
    before, module.EXACT_SUBSETS = module.EXACT_SUBSETS, 0
    try:
        return label("joint", outputs, target, active)
    finally:
        module.EXACT_SUBSETS = before


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 10), st.integers(0, 9999), st.data())
def test_greedy_takes_the_largest_drop_of_the_residual_each_time(routed: int, seed: int, data: st.DataObject) -> None:
    active = data.draw(st.integers(1, routed))
    outputs, target = (t.double() for t in problem(4, routed, 6, seed))
    found = greedy(outputs, target, active)
    for t in range(4):
        left, chosen = target[t], []
        for _ in range(active):
            drops = {i: left.square().sum() - (left - outputs[t, i]).square().sum() for i in range(routed)}
            pick = max((i for i in range(routed) if i not in chosen), key=lambda i: float(drops[i]))
            if not chosen:
                assert torch.allclose(found.gain[t], torch.stack([drops[i] for i in range(routed)]))
            chosen.append(pick)
            left = left - outputs[t, pick]
        assert found.chosen[t].nonzero().flatten().tolist() == sorted(chosen)


def test_many_subsets_go_the_greedy_way() -> None:
    outputs, target = problem(8, 12, 6)  # 12 choose 4 = 495
    assert torch.equal(label("joint", outputs, target, 4).chosen, greedy(outputs, target, 4).chosen)


def test_the_papers_label_is_the_distance_to_its_share() -> None:
    outputs, target = problem(9, 4, 6)
    found = label("paper", outputs, target, 2)
    for t in range(9):
        distance = torch.stack([(outputs[t, i] - target[t] * 2 / 4).norm() for i in range(4)])
        assert torch.allclose(found.gain[t], -distance)
        assert set(found.chosen[t].nonzero().flatten().tolist()) == set(distance.argsort()[:2].tolist())


def test_contribution_is_the_norm() -> None:
    outputs, target = problem(9, 5, 6)
    found = label("contribution", outputs, target, 2)
    assert torch.allclose(found.gain, outputs.square().sum(-1).sqrt())
    assert torch.equal(found.chosen, top_k_hot(outputs.norm(dim=-1), 2))


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([(4, 2), (4, 1), (8, 4), (12, 4)]), st.integers(0, 9999))
def test_joint_captures_more_than_the_papers_label(sizes: tuple[int, int], seed: int) -> None:
    """Defect 5: experts judged alone against F / (N / K)."""
    routed, active = sizes
    outputs, target = problem(32, routed, 8, seed)
    error = {m: float(residual(label(m, outputs, target, active), outputs, target).sum()) for m in METHODS}
    assert error["joint"] < 0.95 * error["paper"]
    assert error["joint"] <= error["contribution"] * (1 + 1e-5)


def test_a_case_where_only_the_pair_is_right() -> None:
    """Two large experts cancel in part: alone each is far from half of F, together they are F."""
    outputs = torch.tensor([[[5.0, 5.0], [5.0, -5.0], [5.0, 1.0], [4.0, -0.5]]])
    target = torch.tensor([[10.0, 0.0]])
    assert label("joint", outputs, target, 2).chosen.tolist() == [[1, 1, 0, 0]]
    assert label("paper", outputs, target, 2).chosen.tolist() == [[0, 0, 1, 1]]
