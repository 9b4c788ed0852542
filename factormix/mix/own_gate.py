"""Fit an adapter's own gate, which decides for each token how much this domain counts. It uses the text of stage 1.

    g(x) = 2 sigmoid(w . x),    w = argmin  mean of CE(1/2, sigmoid(w . x)) over the domain's tokens
                                          + mean of CE(0, sigmoid(w . x)) over general tokens  +  ridge

A token of the domain gets a weight of about 1, with which the adapter was trained. Any other token gets about 0, which
is the base. The problem is convex, and Newton's method solves it in a few steps. No other domain is needed for the fit.
So the own gates of adapters that were injected separately can be used together, and stage 2 can start from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from factormix.mix.batches import Stage1Batches
from factormix.mix.losses import no_cache
from factormix.mix.peft_tuner import MixDAModel, domain_layer
from factormix.nn import DomainGate

RIDGE = 1e-3  # times the inputs' mean square; 1e-2 changes weights by at most 0.05 on texts unlike both sides
NEWTON_STEPS = 30  # the most steps; about seven reach the tolerance
TOLERANCE = 1e-9  # smallest decrease of the loss for which the fit goes on; the loss is below 1


def fit_own_gate(model: PeftModel, domain: str, batches: Stage1Batches, tokens: int) -> dict[int, DomainGate]:
    """Fit the own gates of one domain. The model stays unchanged.

    The inputs of a site are read with the adapter on text of the domain, and without it on general text, because the
    gate will switch the adapter in this way.

    Args:
        model: the model with the domain's adapter active.
        domain: the domain's name.
        batches: the micro-batches of stage 1. Their knowledge is the domain's text.
        tokens: the most tokens of either text.

    Returns:
        By site index, frozen gates of kind "sigmoid" whose weight is (1, H) float32.
    """
    order = torch.randperm(batches.distinct, generator=torch.Generator().manual_seed(0)).tolist()  # mixed
    knowledge = (batches.knowledge(i) for i in order)
    general = ({"input_ids": row[None]} for row in batches.general.input_ids)  # (1, L) each
    with torch.no_grad():
        domain_inputs = _inputs(model, domain, knowledge, tokens)
        with model.disable_adapter():
            general_inputs = _inputs(model, domain, general, tokens)
    gates = {}
    for index, x in domain_inputs.items():
        gate = DomainGate(x.shape[1], [domain])
        assert gate.weight is not None  # the sigmoid kind has a weight
        gate.weight.data.copy_(_separate(x, general_inputs[index]))  # (1, H)
        gates[index] = gate.requires_grad_(False)
    return gates


def _inputs(model: PeftModel, domain: str, batches: Iterator[Mapping[str, Tensor]], tokens: int) -> dict[int, Tensor]:
    """Inputs of every FFN that has the domain's adapter, by site index: (N, H) on the CPU, without padding.

    An FFN that several layers share gives one row for each use of a token.
    """
    base: Any = model.get_base_model()
    sites = cast(MixDAModel, model.base_model).sites  # read before adapters were put beside the FFNs
    layers = {site.index: domain_layer(base, site) for site in sites}
    chosen = {index: layer for index, layer in layers.items() if layer is not None and domain in layer.mixda_adapters}
    seen: dict[int, list[Tensor]] = {index: [] for index in chosen}
    real = torch.empty(0, dtype=torch.bool)  # (B, L), False on padding

    def note(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor]) -> None:
            seen[index].append(args[0][real.to(args[0].device)].cpu())  # (N, H)

        return hook

    handles = [layer.register_forward_pre_hook(note(index)) for index, layer in chosen.items()]
    was_training, total = base.training, 0
    base.eval()
    try:
        for batch in batches:
            ids = batch["input_ids"].to(base.device)  # (B, L)
            mask = batch.get("attention_mask", torch.ones_like(ids)).to(base.device)  # (B, L)
            real = mask.bool()
            base.base_model(input_ids=ids, attention_mask=mask, **no_cache(base))
            total += int(real.sum())
            if total >= tokens:
                break
    finally:
        base.train(was_training)
        for handle in handles:
            handle.remove()
    return {index: torch.cat(parts) for index, parts in seen.items()}


def _separate(domain: Tensor, general: Tensor) -> Tensor:
    """The w of the module's equation: domain (N, H), general (M, H) -> (H,) float64."""
    x = torch.cat([domain, general]).double()  # (N + M, H)
    target = torch.cat([x.new_full((len(domain),), 0.5), x.new_zeros(len(general))])  # (N + M,)
    share = torch.cat([x.new_full((len(side),), 0.5 / len(side)) for side in (domain, general)])  # (N + M,)
    ridge = RIDGE * float((share[:, None] * x.square()).sum(0).mean())

    def loss(w: Tensor) -> Tensor:
        entropy = nn.functional.binary_cross_entropy_with_logits(x @ w, target, share, reduction="sum")
        return entropy + ridge / 2 * w.square().sum()

    w = x.new_zeros(x.shape[1])  # (H,)
    now = loss(w)
    for _ in range(NEWTON_STEPS):
        p = (x @ w).sigmoid()  # (N + M,)
        gradient = x.T @ (share * (p - target)) + ridge * w  # (H,)
        curvature = (x * (share * p * (1 - p))[:, None]).T @ x  # (H, H)
        curvature.diagonal().add_(ridge)
        step = torch.linalg.solve(curvature, gradient)  # (H,)
        before = now
        for _ in range(NEWTON_STEPS):  # halve the step until the loss does not rise
            now = loss(w - step)
            if now <= before:
                break
            step = step / 2
        else:
            return w
        w = w - step
        if before - now < TOLERANCE:
            break
    return w
