"""Fit one site: its router to the labels, then its weights to the dense FFN's output, at the student's own states.

No gradient crosses the site, so the model stays "unhealed". Three parts, each reported:

    router   steps on the router loss
    weights  gradient steps on all weights of the sparse FFN, the router by the straight-through gate
    ridge    closed form: with up projections and routing fixed, the output is linear in the down projection D, so
             D = argmin sum_t |F(x_t) - D z_t|^2 + lambda * sum_j p_j |d_j - d_j0|^2,
             p_j = sum_t z_tj^2 * min(1, MASSIVE * median |F|^2 / |F(x_t)|^2)

A few tokens, BOS above all, have states a thousand times larger, which later layers attend to when nothing else
matters. p leaves them out of the pull, so that they are fitted all but exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from factormix.factor.config import FactorConfig
from factormix.factor.labels import Labels, label, top_k_hot
from factormix.factor.losses import router_loss
from factormix.factor.routers import fit_mlp_router
from factormix.nn import MLPRouter, NeuronRouter, SparseFFN
from factormix.nn.rms import rms
from factormix.run.errors import FactorMixError
from factormix.train import bf16_pays

CHUNK = 2048  # tokens whose activations are held at once
ROUTER_BATCH = 2048  # tokens of a step of the router's fit
BATCH = 512  # tokens of a step on all weights: more steps a pass beat steadier ones (docs/results.md)
FLOOR = 0.3  # c of `fit_weights`, in medians of |F|^2: a token of small output must not outweigh the others
ROUTER_RATE = 0.05  # of the other weights' rate; see `fit_weights`
MASSIVE = 4.0  # medians of |F|^2 from which a token counts as massive
HELD_OUT = 16  # one token in 16 judges the fit and is not fitted; at random, or every BOS might be among them


@dataclass
class SiteReport:
    """How well one site was fitted, on tokens that no fit saw.

    Attributes:
        recall: share of the label's experts that the router chose.
        captured: share of the squared norm of the experts' outputs that the chosen experts hold.
        error_before, error_after: |F - y|^2 / |F|^2 with the router fitted, before and after the layer fit.
        load: (R,) share of tokens that chose each expert; K / R each when even.
        kept: experts of a routed FFN that a static one kept (`keep`).
    """

    site: int
    layer: int
    recall: float = 1.0
    captured: float = 1.0
    error_before: float = 0.0
    error_after: float = 0.0
    load: list[float] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)


def fit_site(ffn: SparseFFN, x: Tensor, target: Tensor, config: FactorConfig, report: SiteReport) -> None:
    """Fit a freshly assembled SparseFFN in place.

    Args:
        ffn: with the dense weights; left in eval mode.
        x: (T, H) its inputs.
        target: (T, H) the dense FFN's outputs.
        config: the recipe.
        report: filled in.

    Raises:
        FactorMixError: NaN in inputs, outputs or losses.
    """
    if not bool(torch.isfinite(target).all()):
        raise FactorMixError(f"NaN or infinity in the dense output of site {report.site} on the calibration text.")
    generator = torch.Generator().manual_seed(config.seed + report.site)
    judged = (torch.randint(HELD_OUT, (len(x),), generator=generator) == 0).to(x.device)  # (T,)
    if ffn.router is not None:
        labels = label_tokens(ffn, x, target, config.label)
        _fit_any_router(ffn, x[~judged], _rows(labels, ~judged), config, generator)
        _report_routing(ffn, x[judged], _rows(labels, judged), report)
    report.error_before = relative_error(ffn, x[judged], target[judged])
    if config.layer_fit and ffn.spec.layout.active_fraction < 1:  # else it is the dense FFN
        if config.fit_passes:
            fit_weights(ffn, x[~judged], target[~judged], config, generator)
        fit_down(ffn, x[~judged], target[~judged], config.ridge)
    report.error_after = relative_error(ffn, x[judged], target[judged])
    if ffn.router is not None:
        _report_load(ffn, x, report)


@torch.no_grad()
def label_tokens(ffn: SparseFFN, x: Tensor, target: Tensor, method: str) -> Labels:
    """Labels of all tokens: x (T, H), dense outputs target (T, H)."""
    assert ffn.experts is not None
    packed, active = ffn.experts.packed(), ffn.spec.active
    chosen, gain = [], []
    bf16 = bf16_pays(x.device)
    for xs, fs in zip(x.split(CHUNK), target.split(CHUNK), strict=True):
        rest = fs if ffn.bias is None else fs - ffn.bias
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            rest = rest if ffn.shared is None else rest - ffn.shared(xs)  # (C, H)
            outputs = torch.stack([packed.run(i, xs) for i in range(len(packed.up))], dim=1)  # (C, R, H)
        found = label(method, outputs.float(), rest.float(), active)
        chosen.append(found.chosen)
        gain.append(found.gain)
    return Labels(torch.cat(chosen), torch.cat(gain))


def _fit_any_router(
    ffn: SparseFFN, x: Tensor, labels: Labels, config: FactorConfig, generator: torch.Generator
) -> None:
    if isinstance(ffn.router, MLPRouter):
        _refuse_nan(torch.tensor(fit_mlp_router(ffn, x, generator)), "the router's fit")
    elif not isinstance(ffn.router, NeuronRouter):
        fit_router(ffn, x, labels, config, generator)


def fit_router(ffn: SparseFFN, x: Tensor, labels: Labels, config: FactorConfig, generator: torch.Generator) -> None:
    """Adam on the router loss over x (T, H), from zero, cosine to zero; inputs are scaled to unit spread meanwhile."""
    assert ffn.router is not None
    spread = x.float().std(0).clamp_min(1e-6)  # (H,)
    weight = torch.zeros_like(ffn.router.weight, dtype=torch.float32, requires_grad=True)  # (R, H)
    optimiser = torch.optim.Adam([weight], lr=config.router_lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.router_steps)
    for batch in _batches(len(x), ROUTER_BATCH, config.router_steps, generator, x.device):
        with torch.enable_grad():
            scores = (x[batch].float() / spread) @ weight.T  # (B, R)
            loss = router_loss(config.router_loss, scores, _rows(labels, batch))
            loss.backward()
        _refuse_nan(loss, "the router's fit")
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    with torch.no_grad():
        ffn.router.weight.copy_(weight / spread)


def fit_weights(ffn: SparseFFN, x: Tensor, target: Tensor, config: FactorConfig, generator: torch.Generator) -> None:
    """Adam on the mean over tokens of |F - y|^2 / (|F|^2 + c), over all weights; c is FLOOR of the median |F|^2.

    Relative errors, as a layer's error matters relative to the token's state: those of massive tokens would drown the
    others, and the closed form sees to them. Rates are fractions of each tensor's own root mean square, which differs
    by 4 between families; the router's is ROUTER_RATE of that, for its gradient says little of experts not chosen: at
    the full rate it unlearns its labels. Float32 weights, bfloat16 products where the device has them.
    """
    dtype = next(ffn.parameters()).dtype
    ffn.float().train()
    weighing = squares(target)  # (T,)
    weighing = (weighing + FLOOR * weighing.median()).clamp_min(1e-30)
    steps = max(1, round(config.fit_passes * len(x) / BATCH))
    groups = [
        {"params": [p], "lr": config.fit_lr * rms(p) * (ROUTER_RATE if name.startswith("router.") else 1)}
        for name, p in ffn.named_parameters()
    ]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for batch in _batches(len(x), BATCH, steps, generator, x.device):
        with torch.enable_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=bf16_pays(x.device)):
            missed = target[batch].float() - ffn(x[batch].float()).float()  # (B, H)
            loss = (squares(missed) / weighing[batch]).mean()
            loss.backward()
        _refuse_nan(loss, "the layer fit")
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
    ffn.to(dtype).eval()


@torch.no_grad()
def fit_down(ffn: SparseFFN, x: Tensor, target: Tensor, ridge: float) -> None:
    """The closed form of the module's text, over x (T, H) and target (T, H); memory I^2, whatever T."""
    old = _down(ffn)  # (I, H)
    gram = torch.zeros(len(old), len(old), device=x.device)  # (I, I)
    moment = torch.zeros_like(old)  # (I, H)
    prior = torch.zeros(len(old), device=x.device)  # (I,)
    median = squares(target).median()
    for xs, fs in zip(x.split(CHUNK), target.split(CHUNK), strict=True):
        z = gated_neurons(ffn, xs)  # (C, I)
        left = fs.float() if ffn.bias is None else fs.float() - ffn.bias.float()
        gram += z.T @ z
        moment += z.T @ (left - z @ old)  # what the old projection leaves
        massive = squares(fs) / (MASSIVE * median).clamp_min(1e-30)  # (C,)
        prior += (z.square() / massive.clamp_min(1).unsqueeze(-1)).sum(0)
    gram.diagonal().add_(ridge * prior + 1e-6 * prior.mean().clamp_min(1e-30))
    scale = gram.diagonal().rsqrt()  # unit diagonal: a well-conditioned system for the Cholesky factor
    factor = torch.linalg.cholesky((gram * scale[:, None] * scale).double())
    change = torch.cholesky_solve((moment * scale[:, None]).double(), factor).float() * scale[:, None]
    _set_down(ffn, old + change)


@torch.no_grad()
def gated_neurons(ffn: SparseFFN, x: Tensor) -> Tensor:
    """Neurons in packed order times their gates, 0 for experts not chosen: x (T, H) -> (T, I) float32.

    Every expert runs on all rows, unlike in `SparseFFN.active_neurons`: that costs little beside the products that
    follow, and docs/results.md was measured with this rounding, which alone moves a model's perplexity (see there).
    """
    parts = []
    if ffn.shared is not None:
        shared = ffn.shared
        parts.append(shared.neurons(x))  # (T, SW)
    if ffn.experts is not None and ffn.router is not None:
        scores, chosen = ffn.router(x)
        scale = ffn.scale(scores, chosen)
        weight = torch.zeros_like(scores).scatter_(1, chosen, 1.0 if scale is None else scale)  # (T, R)
        packed = ffn.experts.packed()
        for i in range(len(packed.up)):
            parts.append(packed.expert_neurons(i, x) * weight[:, i : i + 1].to(x.dtype))  # (T, W)
    return torch.cat(parts, dim=1).float()


@torch.no_grad()
def relative_error(ffn: SparseFFN, x: Tensor, target: Tensor) -> float:
    """|F - y|^2 / |F|^2 over x (T, H) and F = target (T, H)."""
    missed = sum(
        float((fs.float() - ffn(xs).float()).square().sum())
        for xs, fs in zip(x.split(CHUNK), target.split(CHUNK), strict=True)
    )
    return missed / max(float(target.float().square().sum()), 1e-30)


def _down(ffn: SparseFFN) -> Tensor:
    """Down projection with neurons as rows in packed order, (I, H) float32."""
    parts = [] if ffn.shared is None else [ffn.shared.down_proj.weight.T]
    if ffn.experts is not None:
        parts.append(ffn.experts.down_proj.transpose(1, 2).reshape(-1, ffn.spec.hidden))  # (RW, H)
    return torch.cat(parts).float()


def _set_down(ffn: SparseFFN, down: Tensor) -> None:
    cut = ffn.spec.shared * ffn.spec.width
    if ffn.shared is not None:
        ffn.shared.down_proj.weight.copy_(down[:cut].T)
    if ffn.experts is not None:
        ffn.experts.down_proj.copy_(down[cut:].view(-1, ffn.spec.width, ffn.spec.hidden).transpose(1, 2))


def _batches(tokens: int, size: int, steps: int, generator: torch.Generator, device: torch.device) -> Iterator[Tensor]:
    """Random rows, `size` a step."""
    for _ in range(steps):
        yield torch.randint(tokens, (min(size, tokens),), generator=generator).to(device)


def squares(x: Tensor) -> Tensor:
    """|x_t|^2 of each row: (T, H) -> (T,) float32."""
    return x.float().square().sum(-1)


def _rows(labels: Labels, rows: Tensor) -> Labels:
    return Labels(labels.chosen[rows], labels.gain[rows])


def _refuse_nan(loss: Tensor, where: str) -> None:
    if not bool(torch.isfinite(loss)):
        raise FactorMixError(f"the loss of {where} became {float(loss.detach())}; lower its learning rate.")


@torch.no_grad()
def _report_routing(ffn: SparseFFN, x: Tensor, labels: Labels, report: SiteReport) -> None:
    assert ffn.router is not None and ffn.experts is not None
    scores, _ = ffn.router(x)
    picked = top_k_hot(scores, ffn.spec.active)  # (T, R)
    report.recall = float((picked * labels.chosen).sum() / labels.chosen.sum())
    packed = ffn.experts.packed()
    norms = torch.stack([packed.run(i, x).float().square().sum(-1) for i in range(len(packed.up))], 1)  # (T, R)
    report.captured = float((picked * norms).sum() / norms.sum().clamp_min(1e-30))


@torch.no_grad()
def _report_load(ffn: SparseFFN, x: Tensor, report: SiteReport) -> None:
    assert ffn.router is not None
    _, chosen = ffn.router(x)
    counts = torch.bincount(chosen.flatten(), minlength=ffn.spec.layout.routed)
    report.load = (counts / len(x)).tolist()
