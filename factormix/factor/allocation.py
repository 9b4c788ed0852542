"""Allocation: how many slices of each FFN are active, where one budget is shared out among all FFNs.

FFNs do not matter alike. Let g be the gradient, at the output of FFN l, of the log-probability of an output drawn from
the model's own distribution, so that C_l = E[g g^T] is the Fisher information there. An error e of the FFN costs, to
second order and as far as e and g are independent,

    KL(dense || sparse) = E[e^T C_l e] / 2

With neurons a and their down rows d ordered by energy and W neurons a slice, k slices leave e = sum_{j >= kW} a_j d_j
undone. Slices go, one after the other, to the FFN where

    cost_l(k) = E[e^T C_l e]

falls the most. What a router and a fit make good later is left out: how unequal the FFNs are is what counts.
(Fisher information for pruning: Theis et al. 2018, arXiv 1801.05787; here it shares out a budget.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from factormix.factor.activations import relative
from factormix.factor.fit import MASSIVE, squares
from factormix.factor.lockstep import Batch, batches_of
from factormix.factor.losses import last_states
from factormix.ffn import FFNSite, FFNWeights, isolate, weights
from factormix.ffn.site import Activation
from factormix.nn import Layout, vocabulary_head
from factormix.run.errors import FactorMixError
from factormix.run.progress import progress
from factormix.train import bf16_pays

TOKENS = 4096  # of the calibration text: one forward and backward
LOUDEST = 10.0  # medians of |g|^2 up to which a token's gradient counts in full
LEAST = 0.5  # of the mean active fraction: what every FFN keeps


def allocate(
    model: PreTrainedModel, sites: Sequence[FFNSite], layout: Layout, windows: Tensor, *, seed: int = 0,
    quiet: bool = False,
) -> dict[FFNSite, Layout]:  # fmt: skip
    """Layouts whose active neurons add up to those of `layout` in every FFN, or a little less.

    Args:
        model: dense, in eval mode, left as it is.
        sites: the FFNs to be cut.
        layout: the mean.
        windows: (N, L) token ids.
        seed: of the drawn outputs.
        quiet: no progress on stderr.

    Raises:
        FactorMixError: NaN among gradients or neurons.
    """
    batches = batches_of(model, windows[: max(1, TOKENS // windows.shape[1])], 1)
    found = inputs_and_gradients(model, sites, batches, seed, quiet)
    costs = {}
    for site in sites:
        x, gradient = found.pop(site)
        _refuse_nan(gradient, site)
        costs[site] = error_costs(weights(model, site), site.act(), x, gradient, layout)
        _refuse_nan(costs[site], site)
    return share_out(costs, layout)


def _refuse_nan(found: Tensor, site: FFNSite) -> None:
    if not bool(torch.isfinite(found).all()):
        raise FactorMixError(
            f"NaN or infinity among the gradients or neurons of FFN {site.index} on the calibration text; check the "
            "model, use --dtype float32, or --allocation uniform."
        )


def inputs_and_gradients(
    model: PreTrainedModel, sites: Sequence[FFNSite], batches: Sequence[Batch], seed: int = 0, quiet: bool = False
) -> dict[FFNSite, tuple[Tensor, Tensor]]:
    """The inputs x and the gradients g of the module's text at the output, (T, H) bfloat16 each, of every FFN.

    Where the model predicts no tokens, g is that of the last hidden states times noise of unit size.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs: dict[FFNSite, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def note(site: FFNSite, x: Tensor, gradient: Tensor) -> None:
        pairs[site].append(tuple(t.detach().reshape(-1, site.hidden).bfloat16() for t in (x, gradient)))  # type: ignore[arg-type]

    bf16 = bf16_pays(model.device)
    with _gradients_at_outputs(model, sites, note):
        for batch in progress(batches, "weighing FFNs", quiet=quiet):
            with torch.enable_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                _drawn_loss(model, batch, generator).backward()
    return {site: tuple(map(torch.cat, zip(*pairs[site], strict=True))) for site in sites}  # type: ignore[misc]


def _drawn_loss(model: PreTrainedModel, batch: Batch, generator: torch.Generator) -> Tensor:
    """Minus the log-probability of tokens drawn from the model's own predictions, summed over positions."""
    speaks = vocabulary_head(model) is not None
    output = model(**batch, output_hidden_states=not speaks)
    if not speaks:
        states = last_states(output).float()  # (B, L, H)
        noise = torch.randn(states.shape, generator=generator).to(states.device)
        return (states * noise).sum() / states.detach().square().mean().sqrt()
    log_p = output.logits.float().flatten(0, 1).log_softmax(-1)  # (T, V)
    if bool(torch.isnan(log_p).any()):
        raise FactorMixError(
            "NaN in the model's predictions on the calibration text; check it, or use --dtype float32."
        )
    drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator)  # (T, 1)
    return -log_p.gather(1, drawn.to(log_p.device)).sum()


@contextmanager
def _gradients_at_outputs(
    model: PreTrainedModel, sites: Sequence[FFNSite], note: Callable[[FFNSite, Tensor, Tensor], None]
) -> Iterator[None]:
    """Forwards build a graph from the embeddings on, in which no parameter gets a gradient; backward calls
    ``note(site, x, g)`` at each use of an FFN."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def watch(site: FFNSite) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            output.register_hook(lambda gradient: note(site, inputs[0], gradient))

        return hook

    handles = [isolate(model, site).register_forward_hook(watch(site)) for site in sites]
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    # a copy, as some model may write into what an embedding gave
    handles += [
        e.register_forward_hook(lambda module, inputs, out: out.requires_grad_(True).clone()) for e in embeddings
    ]
    try:
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for p in trained:
            p.requires_grad_(True)


@torch.no_grad()
def error_costs(weights: FFNWeights, act: Activation, x: Tensor, gradient: Tensor, layout: Layout) -> Tensor:
    """cost_l of the module's text.

    Args:
        weights, act: of the dense FFN.
        x: (T, H) its inputs.
        gradient: (T, H) g.
        layout: E.

    Returns:
        (E + 1,) float64: with 0, 1, ... E slices; the last is 0.
    """
    x = x.to(weights.up.dtype)
    z, down = weights.neurons(x, act).float(), weights.down.float()  # (T, I), (I, H)
    order = relative(z.square() * squares(down)).mean(0).argsort(descending=True)  # (I,)
    z, down = z[:, order], down[order]
    g = gradient.float() * _weight(gradient, LOUDEST).sqrt().unsqueeze(-1)  # (T, H)
    fisher = g.T @ g / len(g)  # (H, H)
    fisher.diagonal().add_(1e-6 * fisher.diagonal().mean().clamp_min(1e-30))
    down = down @ torch.linalg.cholesky(fisher)  # (I, H), in which E[e^T C e] is a sum of squares
    weight, width = _weight(z @ down, MASSIVE), layout.width(len(down))
    costs, undone = [x.new_zeros((), dtype=torch.float64)], torch.zeros_like(g)  # (T, H)
    for first in range(len(down) - width, -1, -width):
        undone += z[:, first : first + width] @ down[first : first + width]
        costs.append((undone.square().sum(-1) * weight).mean().double())
    return torch.stack(costs[::-1]).cpu()


def _weight(x: Tensor, medians: float) -> Tensor:
    """(T,) 1 for a row of x (T, H) whose square is at most so many medians, less for larger ones."""
    square = squares(x)  # (T,)
    return (medians * square.median() / square.clamp_min(1e-30)).clamp_max(1)


def share_out(costs: Mapping[FFNSite, Tensor], layout: Layout) -> dict[FFNSite, Layout]:
    """The layouts of least total cost, found greedily.

    Args:
        costs: (E + 1,) of each FFN, by active slices.
        layout: the mean; an FFN gets between LEAST of its active slices and all E.
    """
    mean, slices = layout.shared + layout.active, layout.slices
    active = dict.fromkeys(costs, max(1, round(LEAST * mean)))
    left = sum((mean - active[site]) * site.matrix_parameters for site in costs)

    def best_step(site: FFNSite) -> float:
        """The largest saving a slice and parameter over any number of further slices: costs need not be convex."""
        cost, k = costs[site], active[site]
        return max((float(cost[k] - cost[k + n]) / n for n in range(1, slices - k + 1)), default=-1.0)

    gains = {site: best_step(site) / site.matrix_parameters for site in costs}
    while open_sites := [s for s in costs if active[s] < slices and s.matrix_parameters <= left]:
        site = max(open_sites, key=gains.__getitem__)
        active[site] += 1
        left -= site.matrix_parameters
        gains[site] = best_step(site) / site.matrix_parameters
    return {site: layout.with_active(k) for site, k in active.items()}
