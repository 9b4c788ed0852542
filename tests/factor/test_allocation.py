"""The budget: costs are what their formula says, slices go where they save most, the model stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from factormix import FactorMixError
from factormix.factor.allocation import allocate, error_costs, inputs_and_gradients, share_out
from factormix.factor.config import FactorConfig
from factormix.factor.factorize import factorize, work_directory
from factormix.factor.lockstep import batches_of
from factormix.ffn import FFNSite, find_sites, isolate, weights
from factormix.nn import Layout
from tests.factor.test_factorize import QUICK, windows
from tests.families import tiny_model, tiny_output

HALF = Layout.parse("S1A1E4")


def active(layout: Layout) -> int:
    return layout.shared + layout.active


@given(st.lists(st.lists(st.floats(0, 10), min_size=8, max_size=8), min_size=2, max_size=4))
@settings(max_examples=50, deadline=None)
def test_the_budget_is_used_up_within_its_bounds(falls: list[list[float]]) -> None:
    sites = find_sites(tiny_model("llama")) * 2
    layout = Layout.parse("S2A2E8")
    costs = {}
    for number, fall in enumerate(falls):
        site = FFNSite(**{**vars(sites[number]), "index": number})
        costs[site] = torch.tensor([*fall, 0.0]).flip(0).cumsum(0).flip(0)  # falls by `fall` a slice
    found = share_out(costs, layout)
    assert sum(map(active, found.values())) == 4 * len(falls)
    assert all(2 <= active(cut) <= 8 for cut in found.values())


def test_slices_go_where_they_save_most_beyond_a_step_that_saves_nothing() -> None:
    one, two = find_sites(tiny_model("llama"))
    costs = {one: torch.tensor([8.0, 8.0, 8.0, 0.0, 0.0]), two: torch.tensor([3.0, 2.0, 1.0, 0.5, 0.0])}
    found = share_out(costs, HALF)
    assert (str(found[one]), str(found[two])) == ("S2A1E4", "S0A1E4")


@pytest.mark.parametrize("layout", ["S1A1E4", "S0A2E4", "S2A0E4"])
def test_a_layout_keeps_its_proportion(layout: str) -> None:
    cut = Layout.parse(layout)
    assert cut.with_active(2) == cut
    assert [active(cut.with_active(k)) for k in range(1, 5)] == [1, 2, 3, 4]
    assert cut.with_active(4) == Layout(4, 0, 4) and bool(cut.with_active(3).active) == bool(cut.active)


def test_costs_are_the_quadratic_form_of_the_errors() -> None:
    model = tiny_model("llama")
    site = find_sites(model)[0]
    ffn, x = weights(model, site), torch.randn(200, site.hidden, generator=torch.Generator().manual_seed(0))
    g = torch.randn(200, site.hidden, generator=torch.Generator().manual_seed(1))
    g[:, 0] *= 5
    found = error_costs(ffn, site.act(), x, g, HALF)
    fisher, target, z = g.T @ g / len(g), ffn.forward(x, site.act()), ffn.neurons(x, site.act())
    energy = z.square() * ffn.down.square().sum(1)
    order = (energy / energy.sum(1, keepdim=True)).mean(0).argsort(descending=True)
    whole = torch.einsum("th,hk,tk->t", target, fisher, target)
    weight = (4 * whole.median() / whole).clamp_max(1)  # a massive token counts no more
    for slices in range(4):
        undone = order[16 * slices :]  # the neurons of least energy are left out
        error = z[:, undone] @ ffn.down[undone]
        wanted = (torch.einsum("th,hk,tk->t", error, fisher, error) * weight).mean()
        assert found[slices] == pytest.approx(float(wanted), rel=0.02)
    assert len(found) == 5 and found[4] == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "mt5"])
def test_every_ffn_gets_gradients_and_nothing_stays_behind(family: str) -> None:
    model = tiny_model(family)
    sites = find_sites(model)
    batches = batches_of(model, windows(count=1).input_ids, 1)
    found = inputs_and_gradients(model, sites, batches, quiet=True)
    assert found.keys() == set(sites)
    for x, g in found.values():
        assert x.shape == g.shape and float(g.abs().sum()) > 0
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_a_gradient_is_the_slope_of_the_loss() -> None:
    from factormix.factor.allocation import _drawn_loss

    model = tiny_model("llama")
    site, (batch,) = find_sites(model)[1], batches_of(model, windows(count=1).input_ids, 1)
    _, g = inputs_and_gradients(model, [site], [batch], seed=3, quiet=True)[site]  # (T, H)
    step = 1e-3 * g.float() / g.float().norm()

    def loss(sign: int) -> float:
        handle = isolate(model, site).register_forward_hook(lambda module, inputs, y: y + sign * step.view_as(y))
        with torch.no_grad():
            value = float(_drawn_loss(model, batch, torch.Generator().manual_seed(3)).double())
        handle.remove()
        return value

    assert (loss(1) - loss(-1)) / 2e-3 == pytest.approx(float(g.float().norm()), rel=0.05)


def test_an_ffn_that_matters_more_keeps_more_and_the_model_stays_as_it_was() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(0.05)  # the second FFN says next to nothing
    before = tiny_output(model)
    found = allocate(model, find_sites(model), HALF, windows().input_ids, quiet=True)
    assert [active(cut) for cut in found.values()] == [3, 1]
    assert torch.equal(tiny_output(model), before)


def test_a_factored_model_has_the_allocation_and_a_resumed_run_keeps_it(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(0.05)
    config = FactorConfig.parse("S1A1E4", **QUICK)
    work = work_directory(tmp_path / "out", config, {})
    sparse = factorize(model, config, windows(), work=work, quiet=True)
    assert [active(ffn.spec.layout) for ffn in sparse.sparse_ffns().values()] == [3, 1]
    monkeypatch.setattr("factormix.factor.factorize.allocate", None)  # what is saved need not be computed
    again = factorize(model, config, windows(), work=work, quiet=True)
    assert torch.equal(tiny_output(again), tiny_output(sparse))
    even = factorize(model, config.replace(allocation="uniform"), windows(), quiet=True)
    assert [str(ffn.spec.layout) for ffn in even.sparse_ffns().values()] == ["S1A1E4", "S1A1E4"]


def test_nan_in_gradients_alone_is_refused() -> None:
    """A model that predicts no tokens: its last states are NaN, its neurons are not."""
    model = tiny_model("bert-base")
    with torch.no_grad():
        model.encoder.layer[-1].output.LayerNorm.weight[0] = float("nan")
    with pytest.raises(FactorMixError, match="NaN.*FFN 0"):
        allocate(model, find_sites(model), HALF, windows().input_ids, quiet=True)


def test_nan_is_refused() -> None:
    model = tiny_model("bert")
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    with pytest.raises(FactorMixError, match="NaN"):
        allocate(model, find_sites(model), HALF, windows().input_ids, quiet=True)
