"""MoEfication and CMoE against what their papers say, by slow code of one's own."""

from __future__ import annotations

import importlib

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize, silu

from factormix.factor import routers
from factormix.factor.activations import ActivationStats
from factormix.factor.assemble import assemble
from factormix.factor.partition.cmoe import activation_marks, cmoe, distance
from factormix.factor.partition.moefication import input_rows, moefication
from factormix.factor.routers import expert_activity, fit_mlp_router
from factormix.ffn import FFNWeights
from factormix.nn import Layout, MLPRouter, NeuronRouter, SparseFFN, SparseSpec

HIDDEN, INNER = 12, 48


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def weights(gated: bool = True, seed: int = 0) -> FFNWeights:
    up, down, gate = draw(3, INNER, HIDDEN, seed=seed)
    return FFNWeights(up=up, down=down, gate=gate if gated else None)


def stats_of(parts: FFNWeights, x: Tensor, act=silu) -> ActivationStats:
    stats = ActivationStats(parts, act)
    stats.update(x)
    return stats


def spec(layout: Layout, router: str, gated: bool = True, activation: str = "silu") -> SparseSpec:
    return SparseSpec(
        HIDDEN, INNER // layout.slices, layout.shared, layout.active, layout.slices, activation, gated, router=router
    )


# ---------------------------------------------------------------------------------------------------------------------
# MoEfication


def planted(gated: bool) -> tuple[FFNWeights, Tensor]:
    """Neurons in four groups of near input rows, shuffled; and the group of each."""
    centres, group = draw(4, HIDDEN, seed=3), torch.arange(INNER) % 4
    near = centres[group] + 0.05 * draw(INNER, HIDDEN, seed=4)
    scale = 0.1 + draw(INNER, 1, seed=5).abs()  # length says nothing
    up = draw(INNER, HIDDEN, seed=6) * 0.01 + centres.flip(0)[group] if gated else near * scale
    return FFNWeights(up=up, down=draw(INNER, HIDDEN, seed=7), gate=near * scale if gated else None), group


@pytest.mark.parametrize("gated", [False, True])
def test_moefication_puts_near_input_rows_into_one_expert_whatever_their_length(gated: bool) -> None:
    parts, group = planted(gated)
    found = moefication(stats_of(parts, draw(4, HIDDEN)), Layout(0, 1, 4), generator(2))
    assert len(found.shared) == 0 and found.experts.shape == (4, 12)
    assert {frozenset(row) for row in found.experts.tolist()} == {
        frozenset((group == i).nonzero().flatten().tolist()) for i in range(4)
    }


def test_moefication_clusters_joined_rows_each_at_unit_length() -> None:
    parts = weights()
    parts.up *= 100.0
    for j, row in enumerate(input_rows(stats_of(parts, draw(4, HIDDEN)))):
        by_hand = torch.cat([parts.gate[j] / parts.gate[j].norm(), parts.up[j] / parts.up[j].norm()])
        assert torch.allclose(row, by_hand, atol=1e-6)


def test_moefication_activity_is_the_sum_of_positive_activations() -> None:
    parts = weights(gated=False)
    stats = stats_of(parts, draw(4, HIDDEN), torch.relu)
    assignment = moefication(stats, Layout(0, 1, 4), generator())
    ffn = assemble(spec(Layout(0, 1, 4), "mlp", gated=False, activation="relu"), parts, assignment)
    x = draw(7, HIDDEN, seed=9)
    for t in range(7):
        for i in range(4):
            by_hand = sum(max(0.0, float(x[t] @ parts.up[j])) for j in assignment.experts[i].tolist())
            assert float(expert_activity(ffn, x)[t, i]) == pytest.approx(by_hand, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("gated", [True, False])
def test_moefication_router_starts_at_mean_input_rows_and_learns_activity(
    gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, layout = weights(gated), Layout(0, 1, 4)
    (parts.up if parts.gate is None else parts.gate).mul_(torch.logspace(-1, 1, INNER)[:, None])
    assignment = moefication(stats_of(parts, draw(4, HIDDEN)), layout, generator())
    ffn = assemble(spec(layout, "mlp", gated), parts, assignment)
    monkeypatch.setattr(routers, "EPOCHS", 0)
    x = draw(7, HIDDEN, seed=9)
    fit_mlp_router(ffn, x, generator())
    rows = parts.up if parts.gate is None else parts.gate
    for i, expert in enumerate(assignment.experts):
        assert torch.allclose(ffn.router.weight[i], normalize(rows[expert], dim=1).mean(0), atol=1e-5)
        neurons = parts.neurons(x, silu)[:, expert]  # (T, W)
        size = neurons.abs() if gated else neurons.clamp_min(0)
        assert torch.allclose(expert_activity(ffn, x)[:, i], size.sum(1), rtol=1e-4)
    assert torch.equal(ffn.router.second, torch.eye(4))


def test_moefication_router_is_two_layers_on_normalised_inputs_and_finds_the_most_active_experts() -> None:
    parts, _ = planted(gated=False)
    layout = Layout(0, 1, 4)
    assignment = moefication(stats_of(parts, draw(4, HIDDEN), torch.relu), layout, generator(2))
    ffn = assemble(spec(layout, "mlp", gated=False, activation="relu"), parts, assignment)
    x, new = draw(2048, HIDDEN, seed=11), draw(512, HIDDEN, seed=12)
    assert fit_mlp_router(ffn, x, generator()) < 0.6
    assert isinstance(ffn.router, MLPRouter)
    scores, chosen = ffn.router(new)
    by_hand = torch.tanh(normalize(new, dim=1) @ ffn.router.weight.T) @ ffn.router.second.T
    assert torch.allclose(scores, by_hand, atol=1e-5)
    assert torch.equal(chosen[:, 0], ffn.router(1000 * new)[1][:, 0])  # length says nothing
    hit = (chosen[:, 0] == expert_activity(ffn, new).argmax(1)).float().mean()
    assert hit > 0.85


# ---------------------------------------------------------------------------------------------------------------------
# CMoE


@pytest.mark.parametrize("gated", [True, False])
def test_cmoe_marks_the_largest_activations_of_normalised_inputs_and_weights(gated: bool) -> None:
    parts = weights(gated)
    stats = stats_of(parts, draw(20, HIDDEN) * 7)
    marks = activation_marks(stats, marked=5)
    for t, x in enumerate(stats.sample):
        h = []
        for j in range(INNER):
            up = float(normalize(x, dim=0) @ normalize(parts.up[j], dim=0))
            gate = float(normalize(x, dim=0) @ normalize(parts.gate[j], dim=0)) if gated else 0.0
            h.append(abs(float(silu(torch.tensor(gate))) * up) if gated else abs(float(silu(torch.tensor(up)))))
        assert set(marks[t].nonzero().flatten().tolist()) == set(torch.tensor(h).topk(5).indices.tolist())


def test_cmoe_shares_the_neurons_of_highest_rate_and_its_representatives_are_in_their_experts() -> None:
    stats = stats_of(weights(), draw(300, HIDDEN))
    layout = Layout(2, 2, 8)
    marks = activation_marks(stats)
    found = cmoe(stats, layout, generator())
    rate = marks.mean(0)
    assert rate[found.shared].min() >= rate[found.experts.flatten()].max()
    assert len(found.shared) == 12 and found.experts.shape == (6, 6)
    for expert, chosen in zip(found.experts, found.representatives):
        assert chosen in expert
        centre = marks[:, expert].mean(1)
        away = [(centre - marks[:, j]).abs().sum() for j in expert]
        assert (centre - marks[:, chosen]).abs().sum() == pytest.approx(float(min(away)), rel=1e-5)


def test_cmoe_puts_neurons_of_one_pattern_into_one_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of 4 kinds; 8 neurons fire for each kind, and the 16 others always."""
    kinds, neurons = torch.arange(400) % 4, torch.arange(32) % 4
    chance = torch.where(kinds[:, None] == neurons, 0.6, 0.02)
    marks = torch.cat([torch.bernoulli(chance, generator=generator(1)), torch.ones(400, 16)], dim=1)  # (n, I)
    for kind in range(4):
        marks[kinds == kind, kind] = 1.0  # fires oftenest of its kind: a first centre
    module = importlib.import_module("factormix.factor.partition.cmoe")  # the package's `cmoe` is the function
    centres: list[Tensor] = []
    monkeypatch.setattr(module, "activation_marks", lambda stats: marks)
    monkeypatch.setattr(module, "distance", lambda c, a: centres.append(c) or distance(c, a))
    found = cmoe(stats_of(weights(), draw(4, HIDDEN)), Layout(2, 1, 6), generator())
    assert found.shared.tolist() == list(range(32, 48))
    assert {frozenset(expert) for expert in found.experts.tolist()} == {
        frozenset(range(kind, 32, 4)) for kind in range(4)
    }
    assert {tuple(c.tolist()) for c in centres[0].T} == {tuple(marks[:, kind].tolist()) for kind in range(4)}


def test_cmoe_assignment_is_near_the_exact_one() -> None:
    """Tokens of 6 kinds, each with neurons of its own that fire for them, and noise."""
    kinds, neurons = torch.arange(600) % 6, torch.arange(72) % 6
    chance = torch.where(kinds[:, None] == neurons, 0.5, 0.05) * (0.5 + torch.rand(72, generator=generator(1)))
    patterns = torch.bernoulli(chance, generator=generator(2))  # (n, N)
    first = patterns.mean(0).argsort(descending=True)[:6]
    away = distance(patterns[:, first], patterns)  # (R, N)
    assert torch.allclose(away, torch.cdist(patterns[:, first].T, patterns.T, p=1), atol=1e-3)
    from factormix.factor.partition.balanced import balanced_assignment

    ours = away[balanced_assignment(-away), torch.arange(72)].sum()
    rows, columns = linear_sum_assignment(away.repeat_interleave(12, 0).numpy())
    exact = away.repeat_interleave(12, 0)[rows, columns].sum()
    assert exact <= ours <= 1.02 * exact


@pytest.mark.parametrize("gated", [True, False])
def test_cmoe_router_asks_what_the_representative_neurons_do(gated: bool) -> None:
    parts = weights(gated)
    layout = Layout(2, 2, 8)
    found = cmoe(stats_of(parts, draw(300, HIDDEN)), layout, generator())
    ffn: SparseFFN = assemble(spec(layout, "neuron", gated), parts, found)
    assert isinstance(ffn.router, NeuronRouter)
    x = draw(9, HIDDEN, seed=5)
    up = x @ normalize(parts.up[found.representatives], dim=1).T  # (T, R)
    by_hand = (silu(x @ normalize(parts.gate[found.representatives], dim=1).T) * up if gated else silu(up)).abs()
    scores, chosen = ffn.router(x)
    assert torch.allclose(scores, by_hand, atol=1e-5)
    assert torch.equal(chosen.sort(1).values, by_hand.topk(2).indices.sort(1).values)
