"""The layer fit: what each of its parts buys on one FFN, and what it must leave alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from factormix.factor import fit
from factormix.factor.config import FactorConfig
from factormix.factor.fit import SiteReport, fit_down, fit_site, fit_weights, relative_error
from factormix.nn import SparseFFN
from factormix.run.errors import FactorMixError
from tests.nn.sparse import lone_ffn

CONFIG = FactorConfig.parse("S1A2E6", router_steps=40)


def states(tokens: int, hidden: int = 12, seed: int = 1) -> Tensor:
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed))


def all_on(ffn: SparseFFN) -> SparseFFN:
    """The dense FFN that a sparse one was cut from: the same weights, every expert on."""
    dense = lone_ffn(layout="S1A5E6")
    dense.load_state_dict(ffn.state_dict())
    return dense.eval()


@pytest.fixture
def ffn() -> SparseFFN:
    return lone_ffn(layout="S1A2E6")


@torch.no_grad()
def test_each_part_of_the_fit_lowers_the_error_on_tokens_it_never_saw(ffn: SparseFFN) -> None:
    dense, x, new = all_on(ffn), states(6000), states(1000, seed=2)
    errors = [relative_error(ffn, new, dense(new))]
    fit_down(ffn, x, dense(x), ridge=0.1)
    errors.append(relative_error(ffn, new, dense(new)))
    fit_weights(ffn, x, dense(x), CONFIG.replace(fit_passes=40.0), torch.Generator().manual_seed(0))
    errors.append(relative_error(ffn, new, dense(new)))
    assert errors[1] < 0.9 * errors[0] and errors[2] < 0.9 * errors[1]
    assert not ffn.training


@torch.no_grad()
def test_the_closed_form_is_the_minimum_it_claims(ffn: SparseFFN) -> None:
    """No step from the solution, in any of 20 random directions, lowers the sum of squares it minimises (ridge 0)."""
    dense, x = all_on(ffn), states(2000)
    target = dense(x)
    fit_down(ffn, x, target, ridge=0.0)
    best = relative_error(ffn, x, target)
    for seed in range(20):
        moved = copy.deepcopy(ffn)
        for parameter in (moved.shared.down_proj.weight, moved.experts.down_proj):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.add_(1e-2 * noise)
        assert relative_error(moved, x, target) > best


@torch.no_grad()
def test_a_strong_ridge_keeps_the_old_projection(ffn: SparseFFN) -> None:
    dense, x, old = all_on(ffn), states(500), copy.deepcopy(ffn)
    fit_down(ffn, x, dense(x), ridge=1e9)
    assert torch.allclose(ffn.experts.down_proj, old.experts.down_proj, atol=1e-5)


@torch.no_grad()
def test_massive_tokens_are_fitted_in_spite_of_the_ridge(ffn: SparseFFN) -> None:
    """BOS: one state in each window, a thousand times the norm, which later layers lean on."""
    dense, x = all_on(ffn), states(2048)
    x[::64] = 40 * states(1, seed=5)
    target = dense(x)
    fit_down(ffn, x, target, ridge=1.0)
    assert relative_error(ffn, x[:1], target[:1]) < 1e-4
    assert relative_error(ffn, x[1:2], target[1:2]) > 1e-2  # the others are not interpolated


def test_no_position_of_the_windows_is_always_held_out(ffn: SparseFFN, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 16th token once judged the fit: in windows of 512 that was every BOS, and none was ever fitted."""
    dense, x = all_on(ffn), states(2048)
    x[::64] = 50.0
    seen: list[Tensor] = []
    monkeypatch.setattr(fit, "fit_down", lambda ffn, x, target, ridge: seen.append(x))
    fit_site(ffn, x, dense(x).detach(), CONFIG, SiteReport(0, 0))
    count = int((seen[0] == 50.0).all(1).sum())
    assert 16 < count < 32  # most of the 32, not all
    assert 0.9 < len(seen[0]) / len(x) < 0.97


def test_with_every_expert_on_nothing_is_fitted() -> None:
    ffn = lone_ffn(layout="S1A5E6")
    before, x = copy.deepcopy(ffn.state_dict()), states(500)
    with torch.no_grad():
        target = ffn(x)
    fit_site(ffn, x, target, FactorConfig.parse("S1A5E6", router_steps=2), SiteReport(0, 0))
    for name, tensor in ffn.state_dict().items():
        assert name == "router.weight" or torch.equal(tensor, before[name]), name


def test_bfloat16_weights_stay_bfloat16_and_gain(ffn: SparseFFN) -> None:
    ffn, x = ffn.to(torch.bfloat16), states(6000).bfloat16()
    with torch.no_grad():
        target = all_on(ffn).to(torch.bfloat16)(x)
    report = SiteReport(0, 0)
    fit_site(ffn, x, target, CONFIG.replace(fit_passes=40.0), report)
    assert {p.dtype for p in ffn.parameters()} == {torch.bfloat16}
    assert report.error_after < 0.8 * report.error_before


def test_a_rate_that_is_too_high_is_named(ffn: SparseFFN) -> None:
    dense, x = all_on(ffn), states(4096)
    with pytest.raises(FactorMixError, match="loss of the layer fit became .* lower its learning rate"):
        fit_site(ffn, x, dense(x).detach(), CONFIG.replace(fit_lr=1e30, fit_passes=20.0), SiteReport(0, 0))


def test_nan_in_the_target_is_refused(ffn: SparseFFN) -> None:
    target = states(64)
    target[3, 3] = float("nan")
    with pytest.raises(FactorMixError, match="site 7"):
        fit_site(ffn, states(64), target, CONFIG, SiteReport(7, 7))


def test_gradient_steps_move_the_router_less_than_the_rest(ffn: SparseFFN) -> None:
    """At the rate of the other weights it unlearned its labels on the real model (docs/results.md)."""
    dense, x = all_on(ffn), states(4096)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        target = dense(x)
    fit.fit_router(ffn, x, fit.label_tokens(ffn, x, target, "joint"), CONFIG, generator)
    before = copy.deepcopy(ffn)
    fit_weights(ffn, x, target, CONFIG.replace(fit_passes=10.0), generator)

    def moved(name: str) -> float:
        old, new = before.get_parameter(name), ffn.get_parameter(name)
        return float((new - old).detach().norm() / old.detach().norm())

    assert 0 < moved("router.weight") < 0.3 * moved("experts.down_proj")


@pytest.mark.parametrize("layout, gate", [("S1A2E5", "hard"), ("S1A2E5", "soft"), ("S0A2E4", "paper")])
def test_gated_neurons_times_the_down_projections_are_the_output(layout: str, gate: str) -> None:
    ffn, x = lone_ffn(layout=layout, output_weight=gate).eval(), torch.randn(9, 12)
    down = [] if ffn.shared is None else [ffn.shared.down_proj.weight]
    with torch.no_grad():
        neurons = fit.gated_neurons(ffn, x)  # (9, I)
        assert torch.allclose(neurons @ torch.cat([*down, *ffn.experts.down_proj], 1).T, ffn(x), atol=1e-5)
