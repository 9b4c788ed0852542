"""Partitions: every method is valid, balanced and deterministic, and finds the groups that were planted."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import silu

import factormix.factor.partition.coactivation  # noqa: F401
from factormix.factor.activations import ActivationStats
from factormix.factor.partition import PARTITIONS, ROUTED, STATIC, Assignment
from factormix.factor.partition.balanced import balanced_assignment, balanced_kmeans
from factormix.ffn import FFNWeights
from factormix.nn import Layout
from factormix.run.errors import FactorMixError

coactivation = sys.modules["factormix.factor.partition.coactivation"]  # the package has a function of this name
every_method = pytest.mark.parametrize("method", PARTITIONS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_weights(inner: int, hidden: int, gated: bool, seed: int = 0) -> FFNWeights:
    up, down, gate = torch.randn(3, inner, hidden, generator=generator(seed))
    return FFNWeights(up=up, down=down, gate=gate if gated else None)


def stats_of(parts: FFNWeights, tokens: Tensor, **options: int) -> ActivationStats:
    stats = ActivationStats(parts, silu, **options)
    stats.update(tokens)
    return stats


def groups(assignment: Assignment) -> set[frozenset[int]]:
    return {frozenset(row) for row in assignment.experts.tolist()}


@every_method
@settings(max_examples=25, deadline=None)
@given(data=st.data(), gated=st.booleans(), seed=st.integers(0, 99))
def test_any_sizes_give_a_valid_assignment_by_seed(method: str, data: st.DataObject, gated: bool, seed: int) -> None:
    slices, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 7))
    shared = 0 if method in ROUTED else data.draw(st.integers(int(method in STATIC), slices))
    active = 0 if method in STATIC else data.draw(st.integers(int(shared == 0), slices - shared))
    layout, inner, hidden = Layout(shared, active, slices), slices * width, data.draw(st.integers(1, 8))
    tokens = torch.randn(data.draw(st.integers(1, 30)), hidden, generator=generator(seed))
    stats = stats_of(random_weights(inner, hidden, gated, seed), tokens)
    one, same = (PARTITIONS[method](stats, layout, generator(seed)) for _ in range(2))
    assert one.shared.shape == (shared * width,)
    assert one.experts.shape == (layout.routed, width) and one.dropped.shape == (layout.dropped * width,)
    assert sorted([*one.order.tolist(), *one.dropped.tolist()]) == list(range(inner))
    assert torch.equal(one.order, same.order)


def test_an_assignment_names_every_neuron_once() -> None:
    with pytest.raises(AssertionError, match="every neuron once"):
        Assignment(torch.tensor([0]), torch.tensor([[1, 2], [2, 4]]))


@every_method
def test_neurons_without_energy_do_no_harm(method: str) -> None:
    parts = random_weights(12, 5, gated=True)
    parts.gate[3:9] = 0  # silu(0) = 0: half of the neurons never fire
    layout = Layout(3, 0, 6) if method in STATIC else Layout(int(method not in ROUTED), 2, 6)
    assignment = PARTITIONS[method](stats_of(parts, torch.zeros(4, 5)), layout, generator())
    assert sorted([*assignment.order.tolist(), *assignment.dropped.tolist()]) == list(range(12))


def test_contiguous_is_the_models_own_order() -> None:
    stats = stats_of(random_weights(12, 5, gated=False), torch.randn(4, 5))
    assignment = PARTITIONS["contiguous"](stats, Layout(1, 1, 4), generator())
    assert assignment.shared.tolist() == [0, 1, 2]
    assert assignment.experts.tolist() == [[3, 4, 5], [6, 7, 8], [9, 10, 11]]


def test_random_differs_by_seed_and_is_no_order() -> None:
    stats = stats_of(random_weights(64, 5, gated=False), torch.randn(4, 5))
    found = {tuple(PARTITIONS["random"](stats, Layout(0, 1, 4), generator(s)).order.tolist()) for s in range(5)}
    assert len(found) == 5 and tuple(range(64)) not in found


# kmeans: defect 6 clustered gate, up and down each alone


def planted_weights(clusters: int, size: int, part: str, seed: int = 0) -> tuple[FFNWeights, Tensor]:
    """Neurons whose `part` alone says which of the clusters they are of, in random order; and the cluster of each."""
    g = generator(seed)
    owner = torch.arange(clusters).repeat_interleave(size)[torch.randperm(clusters * size, generator=g)]
    parts = random_weights(clusters * size, 24, gated=True, seed=seed + 1)
    centres = torch.randn(clusters, 24, generator=g)
    getattr(parts, part).copy_(centres[owner] + 0.05 * torch.randn(len(owner), 24, generator=g))
    for other in {"gate", "up", "down"} - {part}:
        getattr(parts, other).copy_(0.3 * getattr(parts, other) + torch.randn(24, generator=g))
    return parts, owner


@pytest.mark.parametrize("part", ["gate", "up", "down"])
def test_kmeans_uses_the_joined_vectors(part: str) -> None:
    """Whichever matrix holds the clusters, they are found, and the neuron moves with all three of its vectors."""
    parts, owner = planted_weights(4, 8, part)
    stats = stats_of(parts, torch.randn(16, 24, generator=generator(2)))
    best = max(purity(PARTITIONS["kmeans"](stats, Layout(0, 1, 4), generator(s)), owner) for s in range(5))
    assert best == 1.0


def purity(assignment: Assignment, owner: Tensor) -> float:
    """Share of the neurons that are of their expert's most frequent cluster."""
    counts = [torch.bincount(owner[row]).max() for row in assignment.experts]
    return float(sum(counts)) / assignment.experts.numel()


@pytest.mark.parametrize("method", ["kmeans", "coactivation"])
def test_renaming_the_neurons_renames_the_result(method: str) -> None:
    """Neurons are the same whatever their index; clusters that are apart are found in any order."""
    if method == "kmeans":
        parts, _ = planted_weights(3, 6, "gate")
        tokens = torch.randn(64, 24, generator=generator(2))
    else:
        parts, tokens, _ = planted_activity(3, 6)
    order = torch.randperm(18, generator=generator(7))
    moved = FFNWeights(**{name: None if w is None else w[order] for name, w in vars(parts).items()})
    found = set()
    for weights, back in ((parts, torch.arange(18)), (moved, order)):
        stats = stats_of(weights, tokens)
        runs = [PARTITIONS[method](stats, Layout(0, 1, 3), generator(s)) for s in range(6)]
        named = [frozenset(frozenset(back[list(g)].tolist()) for g in groups(run)) for run in runs]
        found.add(max(named, key=named.count))
    assert len(found) == 1


# coactivation


def planted_activity(clusters: int, size: int, loud: int = 0, seed: int = 0) -> tuple[FFNWeights, Tensor, Tensor]:
    """Each token fires the neurons of one cluster, and the `loud` last neurons always. Weights, tokens, owner."""
    g = generator(seed)
    inner, hidden = clusters * size + loud, clusters + 1
    owner = torch.arange(clusters).repeat_interleave(size)[torch.randperm(clusters * size, generator=g)]
    owner = torch.cat([owner, torch.full((loud,), clusters)])
    up = torch.nn.functional.one_hot(owner, hidden) * (1.0 + torch.rand(inner, 1, generator=g))
    up[clusters * size :] *= 3
    topic = torch.randint(clusters, (400,), generator=g)
    tokens = 3.0 * torch.nn.functional.one_hot(topic, hidden) + 0.05 * torch.randn(400, hidden, generator=g)
    tokens[:, -1] = 2.0
    down = torch.nn.functional.normalize(torch.randn(inner, hidden, generator=g), dim=1)
    return FFNWeights(up=up, down=down), tokens, owner


@pytest.mark.parametrize("clusters, size", [(3, 6), (8, 4), (12, 8)])
def test_coactivation_finds_neurons_that_fire_together(clusters: int, size: int) -> None:
    parts, tokens, owner = planted_activity(clusters, size)
    stats = stats_of(parts, tokens)
    best = max(purity(PARTITIONS["coactivation"](stats, Layout(0, 1, clusters), generator(s)), owner) for s in range(4))
    assert best == 1.0
    random = purity(PARTITIONS["random"](stats, Layout(0, 1, clusters), generator()), owner)
    assert random < 0.8


@pytest.mark.parametrize("method", ["kmeans", "coactivation"])
def test_neurons_that_always_fire_are_shared(method: str) -> None:
    parts, tokens, owner = planted_activity(4, 4, loud=4)
    assignment = PARTITIONS[method](stats_of(parts, tokens), Layout(1, 1, 5), generator())
    assert assignment.shared.tolist() == [16, 17, 18, 19] and (owner[16:] == 4).all()


def static_stats() -> ActivationStats:
    """Three ReLU neurons: 0 fires loud and constant, 1 fluctuates, 2 hardly fires."""
    parts = FFNWeights(up=torch.eye(3), down=torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), gate=None)
    x = torch.tensor([[3.0, 0.0, 0.2], [3.0, 2.0, 0.2], [3.0, 0.0, 0.2], [3.0, 2.0, 0.2]])
    stats = ActivationStats(parts, torch.relu)
    for rows in x.split(3):  # streamed
        stats.update(rows)
    return stats


def test_wanda_keeps_the_energy_and_flap_the_fluctuation() -> None:
    """Means 3, 1, 0.2; variances 0, 1, 0; squared norms of the output weights 1, 1, 2."""
    stats, layout = static_stats(), Layout(1, 0, 3)
    assert PARTITIONS["wanda"](stats, layout, generator()).shared.tolist() == [0]  # 9 against 2 and 0.08
    stats.weights.down[2] *= 20.0  # and now 0.04 times 800: the output weights decide
    assert PARTITIONS["wanda"](stats, layout, generator()).shared.tolist() == [2]
    stats.weights.down[2] /= 20.0
    found = PARTITIONS["flap"](stats, layout, generator())
    assert found.shared.tolist() == [1] and found.dropped.tolist() == [0, 2]
    assert found.compensation is not None
    assert torch.allclose(found.compensation, torch.tensor([3 * 1 + 0.2 * 1, 0.2 * 1]))


def test_flap_weighs_the_fluctuation_by_the_output_weights() -> None:
    parts, tokens = random_weights(48, 6, gated=True), torch.randn(300, 6, generator=generator())
    parts.down *= torch.logspace(-1, 1, 48)[:, None]
    neurons = parts.neurons(tokens, torch.nn.functional.silu)  # (T, I)
    score = neurons.var(0, correction=0) * parts.down.square().sum(1)
    found = PARTITIONS["flap"](stats_of(parts, tokens), Layout(2, 0, 6), generator())
    assert set(found.shared.tolist()) == set(score.topk(16).indices.tolist())
    assert set(found.shared.tolist()) != set(neurons.var(0).topk(16).indices.tolist())


def test_the_rounds_capture_more_than_the_clusters_they_start_from(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, better = Layout(0, 2, 6), 0
    for seed in range(8):
        tokens = torch.randn(300, 6, generator=generator(seed))
        stats = stats_of(random_weights(48, 6, gated=True, seed=seed), tokens)
        shares = []
        for rounds in (0, coactivation.ROUNDS):
            with monkeypatch.context() as patch:
                patch.setattr(coactivation, "ROUNDS", rounds)
                found = PARTITIONS["coactivation"](stats, layout, generator(seed))
            owner = torch.empty(48, dtype=torch.long)
            owner[found.experts.flatten()] = torch.arange(6).repeat_interleave(8)
            shares.append(coactivation.captured(stats.sampled_energy(), owner, layout)[0])
        assert shares[1] >= shares[0] - 1e-6
        better += shares[1] > shares[0] + 1e-4
    assert better >= 4


# balanced assignment


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9999), st.sampled_from(["normal", "ties", "equal", "one"]))
def test_balanced_assignment_is_balanced(count: int, size: int, seed: int, kind: str) -> None:
    score = torch.randn(count, count * size, generator=generator(seed))
    if kind == "ties":
        score = score.round()
    elif kind == "equal":
        score = torch.zeros_like(score)
    elif kind == "one":
        score[0] += 100  # all want the same group
    owner = balanced_assignment(score)
    assert torch.bincount(owner, minlength=count).tolist() == [size] * count


@pytest.mark.parametrize("count, size", [(2, 5), (4, 1), (4, 6), (8, 4), (12, 16)])
def test_balanced_assignment_is_near_the_optimum(count: int, size: int) -> None:
    shares = []
    for seed in range(40):
        score = torch.rand(count, count * size, generator=generator(seed))
        got = float(score.gather(0, balanced_assignment(score)[None]).sum())
        seats = score.repeat_interleave(size, 0).numpy()
        shares.append(got / float(seats[linear_sum_assignment(seats, maximize=True)].sum()))
    assert sum(shares) / len(shares) > 0.95 and min(shares) > 0.6 and max(shares) <= 1 + 1e-6


def test_balanced_kmeans_recovers_directions() -> None:
    g = generator()
    owner = torch.arange(5).repeat_interleave(10)[torch.randperm(50, generator=g)]
    points = torch.randn(5, 16, generator=g)[owner] * (1 + torch.rand(50, 1, generator=g))  # lengths do not count
    found = [balanced_kmeans(points + 0.01 * torch.randn(50, 16), 5, generator(s)) for s in range(6)]
    agree = [all(len(set(f[owner == c].tolist())) == 1 for c in range(5)) for f in found]
    assert any(agree)


# statistics


def test_memory_does_not_grow_with_the_text() -> None:
    stats = ActivationStats(random_weights(8, 4, gated=True), silu, sample=50)
    for _ in range(30):
        stats.update(torch.randn(37, 4))
    assert stats.tokens == 30 * 37 and stats.sample.shape == (50, 4)
    held = [v for v in vars(stats).values() if isinstance(v, Tensor)]
    assert sum(t.untyped_storage().nbytes() for t in held) < 50 * 4 * 4 + 50 * 4 + 8 * 8 + 1000


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 99))
def test_pieces_give_the_moments_of_the_whole(sizes: list[int], seed: int) -> None:
    tokens = torch.randn(sum(sizes), 4, generator=generator(seed))
    parts = random_weights(8, 4, gated=True, seed=seed)
    whole, pieces = stats_of(parts, tokens, sample=9), ActivationStats(parts, silu, sample=9)
    for piece in tokens.split(sizes):
        pieces.update(piece)
    assert torch.allclose(pieces.energy, whole.energy, rtol=1e-5)
    energy = parts.neurons(tokens, silu).square() * parts.down.square().sum(1)
    assert torch.allclose(whole.energy, (energy / energy.sum(1, keepdim=True)).mean(0), rtol=1e-4)
    rows = {tuple(row) for row in tokens.tolist()}
    assert len(pieces.sample) == min(9, len(tokens)) and all(tuple(row) in rows for row in pieces.sample.tolist())
    assert len({tuple(row) for row in pieces.sample.tolist()}) == len(pieces.sample)


def test_the_sample_is_uniform() -> None:
    """Each of 40 tokens in four pieces is kept in 10 of 40 of the runs: chi-square of 40 cells far below 3 sigma."""
    parts, runs = random_weights(4, 2, gated=False), 1500
    kept = torch.zeros(40)
    tokens = torch.arange(80.0).view(40, 2)
    for seed in range(runs):
        stats = ActivationStats(parts, silu, seed=seed, sample=10)
        for piece in tokens.split([3, 17, 1, 19]):
            stats.update(piece)
        kept[(stats.sample[:, 0] / 2).long()] += 1
    expected = runs / 4
    chi_square = float(((kept - expected).square() / (expected * 0.75)).sum())
    assert chi_square < 39 + 4 * (2 * 39) ** 0.5


def test_the_sample_depends_on_the_seed_only() -> None:
    parts, tokens = random_weights(4, 2, gated=False), torch.randn(60, 2, generator=generator())
    one, same, other = (stats_of(parts, tokens, seed=s, sample=7).sample for s in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_sampled_energy_averages_to_the_energy() -> None:
    parts, tokens = random_weights(6, 4, gated=True), torch.randn(30, 4, generator=generator(3))
    stats = stats_of(parts, tokens)
    assert torch.allclose(stats.sampled_energy().mean(0), stats.energy, rtol=1e-4)
    most, rest = stats.most_important(2)
    assert set(most.tolist()) == set(stats.energy.topk(2).indices.tolist())
    assert most.tolist() == sorted(most.tolist()) and rest.tolist() == sorted(rest.tolist())


def test_bfloat16_inputs_and_weights() -> None:
    parts = random_weights(6, 4, gated=True)
    half = FFNWeights(**{name: None if w is None else w.bfloat16() for name, w in vars(parts).items()})
    tokens = torch.randn(30, 4, generator=generator(3))
    assert torch.allclose(stats_of(half, tokens.bfloat16()).energy, stats_of(parts, tokens).energy, rtol=0.1)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_is_refused_and_not_taken_in(bad: float) -> None:
    stats = ActivationStats(random_weights(6, 4, gated=True), silu)
    stats.update(torch.ones(3, 4))
    before = stats.energy
    tokens = torch.ones(5, 4)
    tokens[2, 1] = bad
    with pytest.raises(FactorMixError, match="NaN or infinity"):
        stats.update(tokens)
    assert torch.equal(stats.energy, before) and stats.tokens == 3 and len(stats.sample) == 3
