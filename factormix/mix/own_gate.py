"""An adapter's own gate: on which tokens should this domain speak? Fitted after stage 1, on the text of stage 1.

    g(x) = 2 sigmoid(w . x),    w = argmin  mean of CE(1/2, sigmoid(w . x)) over the domain's tokens
                                          + mean of CE(0, sigmoid(w . x)) over general tokens  +  ridge

So a token of the domain is given about 1, the weight that the adapter was trained at, and any other about 0: the base.
It is convex and takes Newton's method a few steps. Nothing of another domain is needed, so own gates of adapters that
were injected apart stand beside each other as they are, and stage 2 may start from them.
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

RIDGE = 1e-3  # of the inputs' mean square; 1e-2 gives the same weights within 0.05 on texts unlike both sides
NEWTON_STEPS = 30  # at most; seven or so reach the tolerance
TOLERANCE = 1e-9  # of the loss, which is below 1


def fit_own_gate(model: PeftModel, domain: str, batches: Stage1Batches, tokens: int) -> dict[int, DomainGate]:
    """The gates of one domain, by site index; the model is left as it was.

    Args:
        model: with the domain's adapter, active.
        domain: its name.
        batches: of stage 1: its knowledge is the domain's text, its general text the other.
        tokens: of each side, at most.

    A site's inputs are read with the adapter on text of the domain and without it on general text, as the gates will
    have it.
    """
    order = torch.randperm(batches.distinct, generator=torch.Generator().manual_seed(0)).tolist()  # text, facts mixed
    knowledge = (batches.knowledge(i) for i in order)
    general = ({"input_ids": row[None]} for row in batches.general.input_ids)  # (1, L) each
    with torch.no_grad():
        of_domain = _inputs(model, domain, knowledge, tokens)
        with model.disable_adapter():
            of_general = _inputs(model, domain, general, tokens)
    gates = {}
    for index, x in of_domain.items():
        gate = DomainGate(x.shape[1], [domain])
        assert gate.weight is not None  # the sigmoid kind has one
        gate.weight.data.copy_(_separate(x, of_general[index]))  # (1, H)
        gates[index] = gate.requires_grad_(False)
    return gates


def _inputs(model: PeftModel, domain: str, batches: Iterator[Mapping[str, Tensor]], tokens: int) -> dict[int, Tensor]:
    """Inputs of every FFN that has the domain's adapter, (N, H) by site index, on the CPU; padding left out.

    A site that several layers use sees each of a token's uses.
    """
    base: Any = model.get_base_model()
    sites = cast(MixDAModel, model.base_model).sites  # read before the adapters stood beside the FFNs
    layers = {site.index: domain_layer(base, site) for site in sites}
    chosen = {index: layer for index, layer in layers.items() if layer is not None and domain in layer.mixda_adapters}
    seen: dict[int, list[Tensor]] = {index: [] for index in chosen}
    there = torch.empty(0, dtype=torch.bool)

    def note(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor]) -> None:
            seen[index].append(args[0][there.to(args[0].device)].cpu())  # (N, H)

        return hook

    handles = [layer.register_forward_pre_hook(note(index)) for index, layer in chosen.items()]
    was_training, total = base.training, 0
    base.eval()
    try:
        for batch in batches:
            ids = batch["input_ids"].to(base.device)  # (B, L)
            mask = batch.get("attention_mask", torch.ones_like(ids)).to(base.device)  # (B, L)
            there = mask.bool()
            base.base_model(input_ids=ids, attention_mask=mask, **no_cache(base))
            total += int(there.sum())
            if total >= tokens:
                break
    finally:
        base.train(was_training)
        for handle in handles:
            handle.remove()
    return {index: torch.cat(parts) for index, parts in seen.items()}


def _separate(domain: Tensor, general: Tensor) -> Tensor:
    """w of the module's equation: domain (N, H), general (M, H) -> (H,), float64."""
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
        for _ in range(NEWTON_STEPS):  # half as far while that is downhill no longer
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
