"""Keep the experts that serve a task: a factored model and the task's text in, a static model out.

The shared neurons S(x) and the K' experts that serve the text best run for every token; the others go, and the router
with them. With w_t = 1 / (|F(x_t)|^2 + c), an FFN keeps the set C that comes nearest to the outputs F it is to have,

    lost(C) = sum_t w_t |F(x_t) - S(x_t) - sum_(i in C) E_i(x_t)|^2

built greedily, expert by expert. F is the dense model's FFN where that model is at hand, else the routed one: then an
expert counts by how often it is chosen and by what it adds, and against what it says where it was not chosen. Then, as
in `factorize`, the FFN is fitted to F on the same text.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factormix.data.packing import Packed
from factormix.factor.config import FactorConfig
from factormix.factor.factorize import packed_text, replace_ffns
from factormix.factor.fit import CHUNK, FLOOR, SiteReport, fit_site, squares
from factormix.factor.heal import heal
from factormix.factor.lockstep import Lockstep
from factormix.ffn import FFNSite, copy_structure, isolate
from factormix.nn import FactorMixMixin, SparseFFN, SparseSpec, adopt, sites_of
from factormix.run.errors import FactorMixError
from factormix.run.workdir import WorkDirectory

ROUTING = ("allocation", "partition", "label", "router_loss", "router", "gate")
"""Fields of FactorConfig that say how experts and routers are made: here they are made already."""


def keep_experts(
    model: PreTrainedModel,
    config: FactorConfig,
    task: Packed | Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dense: PreTrainedModel | None = None,
    healing: Packed | Sequence[str] | None = None,
    work: WorkDirectory | None = None,
    quiet: bool = False,
) -> PreTrainedModel:
    """Make a factored model static, with the experts that serve a task.

    Args:
        model: a FactorMix model with routed experts. It stays usable; the result shares all but its FFNs.
        config: `layout` says what stays: S6A0E16 keeps 6 of 16 slices, so of an S4A4E16 model the 4 shared ones and 2
            experts. Where FFNs differ (allocation), it is the mean: each keeps slices in proportion to those it ran,
            and one that ran whole stays whole. Windows, tokens, seed, layer fit and healing as in `factorize`.
        task: the task's text: packed windows, documents or paths.
        tokenizer: needed for documents.
        dense: the dense model that `model` was made from, the teacher of ranking, fit and healing; else `model` is, and
            what its router lost on this text stays lost.
        healing: text for healing; by default the task's.
        work, quiet: as in `factorize`.

    Returns:
        A transformers model in eval mode. The experts that each FFN kept are in
        ``config.factormix["made_by"]["sites"][i]["kept"]``.

    Raises:
        FactorMixError: a model that is not factored or has nothing to drop, a layout that it cannot become, options
            that say how experts are made, a dense model of other FFNs.
    """
    if not isinstance(model, FactorMixMixin):
        raise FactorMixError(f"{type(model).__name__} is dense; its experts can be kept once it is factored.")
    if dense is not None and (isinstance(dense, FactorMixMixin) or sites_of(dense) != sites_of(model)):
        raise FactorMixError(
            f"{type(dense).__name__} is not the dense model that this {type(model).__name__} was made of."
        )
    sparse = model.sparse_ffns()
    specs = {index: ffn.spec for index, ffn in sparse.items()}
    check_keep(config, specs)
    shared = kept_slices(config, specs)
    sites = {site: _static(specs[site.index], shared[site.index]) for site in sites_of(model) if site.index in shared}
    packed = packed_text(task, model, tokenizer, config.window, config.tokens, config.seed)
    started = time.perf_counter()
    student = copy_structure(model).eval()
    build = partial(_kept, shared=shared, config=config, dense=dense)
    reports = replace_ffns(student, sites, packed, build, work=work, quiet=quiet)
    made_by: dict[str, Any] = {
        "config": config.to_dict(),
        "calibration": {"tokens": packed.tokens, "sha256": packed.sha256},
        "seconds": time.perf_counter() - started,
        "sites": [asdict(report) for report in reports],
        "kept_from": model.config.factormix["made_by"],
    }
    whole = {site: specs[site.index] for site in sites_of(model) if site.index in specs.keys() - shared.keys()}
    adopt(student, {**sites, **whole}, made_by)
    if config.heal.tokens:
        source = task if healing is None else healing
        teacher = model if dense is None else dense
        text = packed_text(source, model, tokenizer, config.window, config.heal.tokens, config.seed + 1)
        made_by["healing"] = heal(student, teacher, text, config.heal, seed=config.seed, work=work, quiet=quiet)
    return student.eval()


def check_keep(config: FactorConfig, specs: Mapping[int, SparseSpec]) -> None:
    """Refuse what cannot be kept, by arithmetic.

    Args:
        config: with the layout to come.
        specs: of the factored model's FFNs, by site.

    Raises:
        FactorMixError: says what is allowed.
    """
    cut, defaults = config.cut, FactorConfig()
    for key in ROUTING:
        if getattr(config, key) != getattr(defaults, key):
            raise FactorMixError(
                f"{key} {getattr(config, key)!r} says how experts are made; those to keep are made already. Leave it "
                "out."
            )
    if config.layers is not None:
        raise FactorMixError(f"layers {list(config.layers)}: experts are kept at every factored FFN. Leave it out.")
    if config.heal.pa or config.heal.balance:
        raise FactorMixError("heal.pa and heal.balance train routers; a model of kept experts has none. Leave them 0.")
    if not any(spec.layout.routed for spec in specs.values()):
        raise FactorMixError(f"the FFNs are {next(iter(specs.values())).layout}: no routed experts to choose from.")
    for index, spec in specs.items():
        old = spec.layout
        if spec.output_weight != "hard":
            raise FactorMixError(
                f"FFN {index} has output weight {spec.output_weight!r}, which scales the chosen experts; only those of "
                "'hard' can run for every token as they are."
            )
        if cut.active or cut.slices != old.slices or not _least(specs) <= cut.shared < old.slices:
            allowed = f"S{max(_least(specs), 1)}A0E{old.slices} to S{old.slices - 1}A0E{old.slices}"
            raise FactorMixError(
                f"layout {cut} cannot be kept of FFN {index}, {old} ({old.shared} shared slices and {old.routed} "
                f"experts); allowed: {allowed}."
            )


def kept_slices(config: FactorConfig, specs: Mapping[int, SparseSpec]) -> dict[int, int]:
    """How many slices each routed FFN keeps: those of the layout where all FFNs are alike, else in proportion to those
    that it ran, but at least its shared ones and at most all but one."""
    mean = sum(spec.shared + spec.active for spec in specs.values()) / len(specs)
    return {
        index: min(max(round((spec.shared + spec.active) * config.cut.shared / mean), spec.shared, 1), spec.slices - 1)
        for index, spec in specs.items()
        if spec.layout.routed
    }


def _least(specs: Mapping[int, SparseSpec]) -> int:
    """Shared slices of a routed FFN, the mean rounded up."""
    shared = [spec.shared for spec in specs.values() if spec.layout.routed]
    return -(-sum(shared) // len(shared))


def _static(spec: SparseSpec, shared: int) -> SparseSpec:
    return replace(spec, shared=shared, active=0, router="linear")


def _kept(
    steps: Lockstep,
    site: FFNSite,
    x: Tensor,
    target: Tensor,
    shared: Mapping[int, int],
    config: FactorConfig,
    dense: PreTrainedModel | None,
) -> tuple[SparseFFN, SiteReport]:
    """One routed FFN made static and fitted; x, target (T, H)."""
    routed = steps.old(site)
    assert isinstance(routed, SparseFFN)
    if dense is not None:
        with torch.no_grad():
            target = torch.cat([isolate(dense, site)(rows) for rows in x.split(CHUNK)])  # (T, H)
    report = SiteReport(site=site.index, layer=site.layers[0])
    report.kept = most_useful(routed, x, target, shared[site.index] - routed.spec.shared)
    ffn = static_ffn(routed, report.kept)
    fit_site(ffn, x, target, config, report)
    return ffn, report


@torch.no_grad()
def most_useful(ffn: SparseFFN, x: Tensor, target: Tensor, count: int) -> list[int]:
    """The `count` experts that the module's text keeps, ascending.

    Args:
        ffn: routed.
        x: (T, H) its inputs.
        target: (T, H) the outputs F that are wanted.
        count: K', 0 to R.
    """
    assert ffn.experts is not None
    packed, routed = ffn.experts.packed(), ffn.spec.layout.routed
    gram = torch.zeros(routed, routed, device=x.device)  # (R, R) sum_t w_t E_i . E_j
    moment = torch.zeros(routed, device=x.device)  # (R,) sum_t w_t E_i . (F - S)
    size = squares(target)  # (T,)
    weight = (size + FLOOR * size.median()).clamp_min(1e-30).reciprocal()  # (T,)
    for xs, fs, ws in zip(x.split(CHUNK), target.split(CHUNK), weight.split(CHUNK), strict=True):
        outputs = torch.stack([packed.run(i, xs).float() for i in range(routed)], dim=1)  # (C, R, H)
        rest = fs.float() if ffn.shared is None else fs.float() - ffn.shared(xs).float()  # (C, H)
        rest = rest if ffn.bias is None else rest - ffn.bias.float()
        weighed = outputs * ws[:, None, None]  # (C, R, H)
        gram += torch.einsum("crh,csh->rs", weighed, outputs)
        moment += torch.einsum("crh,ch->r", weighed, rest)
    kept: list[int] = []
    for _ in range(count):
        gain = 2 * moment - gram.diagonal() - 2 * gram[:, kept].sum(1)  # (R,) what lost(C) falls by
        gain[kept] = -torch.inf
        kept.append(int(gain.argmax()))
    return sorted(kept)


@torch.no_grad()
def static_ffn(ffn: SparseFFN, kept: Sequence[int]) -> SparseFFN:
    """A SparseFFN without a router: the shared neurons of `ffn` and, always on, its experts `kept`."""
    spec = _static(ffn.spec, ffn.spec.shared + len(kept))
    with torch.device("meta"):
        static = SparseFFN(spec)
    like = next(ffn.parameters())
    static = static.to(like.dtype).to_empty(device=like.device).eval()
    assert static.shared is not None and ffn.experts is not None
    up, bias = getattr(ffn.experts, ffn.experts.up_name)[kept], ffn.experts.up_bias  # (K', W or 2W, H)
    old = ffn.shared
    static.shared.up_proj.weight.copy_(_joined(None if old is None else old.up_proj.weight, up, spec.gated))
    if bias is not None:
        static.shared.up_proj.bias.copy_(_joined(None if old is None else old.up_proj.bias, bias[kept], spec.gated))
    downs = [] if old is None else [old.down_proj.weight]  # (H, SW)
    static.shared.down_proj.weight.copy_(torch.cat([*downs, *ffn.experts.down_proj[kept]], dim=1))  # (H, S'W)
    if static.bias is not None and ffn.bias is not None:
        static.bias.copy_(ffn.bias)
    return static


def _joined(shared: Tensor | None, experts: Tensor, gated: bool) -> Tensor:
    """Rows of shared neurons, then of the experts (K', rows, ...), with the gate's rows first where there is a gate."""
    halves = 2 if gated else 1
    parts = [] if shared is None else [shared.chunk(halves)]
    parts += [expert.chunk(halves) for expert in experts]
    return torch.cat([torch.cat(half) for half in zip(*parts, strict=True)])
