"""FactorLLM, top to bottom: a dense transformer and some text in, a sparse transformer out.

text -> windows -> how many slices each FFN keeps active -> (site by site, at the student's own states:)
    inputs and dense outputs -> statistics -> assignment -> sparse FFN -> router and layer fit
-> healing, where asked for -> a transformers model
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factormix.data.packing import Packed, evenly, fitting, pack, wants_bos
from factormix.data.text import read_parts
from factormix.factor.activations import ActivationStats
from factormix.factor.allocation import allocate
from factormix.factor.assemble import assemble, sparse_spec
from factormix.factor.config import FactorConfig
from factormix.factor.fit import SiteReport, fit_site
from factormix.factor.heal import heal
from factormix.factor.lockstep import Lockstep, batches_of
from factormix.factor.partition import BLIND, COMPENSATED, PARTITIONS
from factormix.ffn import FFNSite, copy_structure, find_sites, isolate
from factormix.nn import FactorMixMixin, Layout, SparseFFN, SparseSpec, adopt
from factormix.run.errors import FactorMixError
from factormix.run.progress import progress
from factormix.run.workdir import WorkDirectory

ALLOCATION = "allocation"  # the stage of the work directory
BATCH_WINDOWS = 4  # windows of one halted forward


def factorize(
    dense: PreTrainedModel,
    config: FactorConfig,
    calibration: Packed | Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    healing: Packed | Sequence[str] | None = None,
    keep_dense: bool = True,
    work: WorkDirectory | None = None,
    quiet: bool = False,
) -> PreTrainedModel:
    """Make a model's FFNs sparse.

    Args:
        dense: any model of a known family, with any head. It stays usable; the result shares its embeddings,
            attention and norms, so both together cost one FFN more than either.
        config: the recipe.
        calibration: packed windows; or documents or paths of text files, which are packed here.
        tokenizer: needed for documents; by default the one `dense` was loaded with.
        healing: text for healing; by default the calibration text, all of it.
        keep_dense: False frees each dense FFN as soon as its site is done, and leaves `dense` unusable.
        work: sites that are done are kept there, and a killed run goes on from them.
        quiet: no progress on stderr.

    Returns:
        A transformers model in eval mode: generate, Trainer and save_pretrained work. How each site was fitted is in
        ``config.factormix["made_by"]["sites"]``.

    Raises:
        FactorMixError: a family that is not known, a layout that does not divide, too little text, NaN.
    """
    if isinstance(dense, FactorMixMixin):
        raise FactorMixError(f"{type(dense).__name__} is sparse already; factorize the dense model it was made from.")
    sites = find_sites(dense, config.layers)
    for site in sites:
        _spec(site, config, config.cut)  # refuses before any compute
    packed = packed_text(calibration, dense, tokenizer, config.window, config.tokens, config.seed)
    started = time.perf_counter()
    was_training = dense.training
    student = copy_structure(dense).eval()
    layouts = _layouts(student, sites, config, packed.input_ids, work, quiet)
    specs = {site: _spec(site, config, layouts[site]) for site in sites}
    build = partial(_factored, config=config, specs=specs)
    reports = replace_ffns(student, specs, packed, build, keep_old=keep_dense, work=work, quiet=quiet)
    made_by: dict[str, Any] = {
        "config": config.to_dict(),
        "calibration": {"tokens": packed.tokens, "sha256": packed.sha256},
        "seconds": time.perf_counter() - started,
        "sites": [asdict(report) for report in reports],
    }
    adopt(student, specs, made_by)
    dense.train(was_training)
    if config.heal.tokens:
        if not keep_dense:
            raise FactorMixError("healing needs the dense model as teacher: keep_dense=False goes with heal.tokens 0.")
        source = calibration if healing is None else healing
        text = packed_text(source, dense, tokenizer, config.window, config.heal.tokens, config.seed + 1)
        made_by["healing"] = heal(
            student, dense, text, config.heal,
            label=config.label, pa_form=config.router_loss, seed=config.seed, work=work, quiet=quiet,
        )  # fmt: skip
    return student.eval()


Build = Callable[[Lockstep, FFNSite, Tensor, Tensor], tuple[SparseFFN, SiteReport]]


def replace_ffns(
    student: PreTrainedModel,
    specs: Mapping[FFNSite, SparseSpec],
    text: Packed,
    build: Build,
    *,
    keep_old: bool = True,
    work: WorkDirectory | None = None,
    quiet: bool = False,
) -> list[SiteReport]:
    """Replace a model's FFNs in place, front to back, each at the states that the new ones before it give.

    Every position counts, BOS too: its huge output is what later layers attend to when nothing else matters.

    Args:
        student: the model.
        specs: what will stand at each site, in their order.
        text: windows to run.
        build: makes the new FFN of a site from its inputs (T, H) and the old one's outputs (T, H).
        keep_old, work, quiet: as `factorize` has them.
    """
    reports, sites = [], list(specs)
    batches = batches_of(student, text.input_ids, BATCH_WINDOWS)
    done = _load_done(student, specs, work)
    every_use = {s.index: _inputs_of_every_use(student, s, batches) for s in sites if s.use_count > 1}
    with Lockstep(student, sites, batches, done) as steps:
        for site in progress(sites, "factoring FFNs", quiet=quiet):
            if site.index in done:
                reports.append(SiteReport(**work.load(_stage(site))[1]))  # type: ignore[union-attr]
                continue
            inputs = steps.inputs(site)  # (B, L, H) a batch
            x = every_use.get(site.index)  # (T, H)
            if x is None:
                x = torch.cat([states.reshape(-1, site.hidden) for states in inputs])
            with torch.no_grad():
                target = torch.cat([steps.old(site)(rows) for rows in x.split(4096)])  # (T, H)
            ffn, report = build(steps, site, x, target)
            steps.replace(site, ffn)
            reports.append(report)
            if work is not None:
                work.save(_stage(site), dict(ffn.state_dict()), asdict(report))
            if not keep_old:
                _release(steps.old(site))
    return reports


def _factored(
    steps: Lockstep, site: FFNSite, x: Tensor, target: Tensor, config: FactorConfig, specs: Mapping[FFNSite, SparseSpec]
) -> tuple[SparseFFN, SiteReport]:
    """One dense FFN cut and fitted."""
    dense_weights = steps.weights(site)
    stats = ActivationStats(dense_weights, site.act(), seed=config.seed + site.index)
    for rows in () if config.partition in BLIND else x.split(4096):
        stats.update(rows)
    generator = torch.Generator().manual_seed(config.seed + site.index)
    assignment = PARTITIONS[config.partition](stats, specs[site].layout, generator)
    ffn = assemble(specs[site], dense_weights, assignment).eval()
    report = SiteReport(site=site.index, layer=site.layers[0])
    fit_site(ffn, x, target, config, report)
    return ffn, report


def _spec(site: FFNSite, config: FactorConfig, layout: Layout) -> SparseSpec:
    return sparse_spec(site, layout, config.gate, config.partition in COMPENSATED, config.router)


def _layouts(
    model: PreTrainedModel, sites: Sequence[FFNSite], config: FactorConfig, windows: Tensor,
    work: WorkDirectory | None, quiet: bool,
) -> dict[FFNSite, Layout]:  # fmt: skip
    """Each FFN's layout; a resumed run keeps those it began with."""
    if not config.shares_out or len(sites) == 1:
        return dict.fromkeys(sites, config.cut)
    if work is not None and work.done(ALLOCATION):
        words = work.load(ALLOCATION)[1]["layouts"]
        return {site: Layout.parse(word) for site, word in zip(sites, words, strict=True)}
    layouts = allocate(model, sites, config.cut, windows, seed=config.seed, quiet=quiet)
    if work is not None:
        work.save(ALLOCATION, {}, {"layouts": [str(layout) for layout in layouts.values()]})
    return layouts


def _inputs_of_every_use(model: PreTrainedModel, site: FFNSite, batches: list[dict[str, Tensor]]) -> Tensor:
    """Inputs (T, H) of an FFN that several layers share (ALBERT), from all its uses in the old model.

    Lockstep halts at the first use only. Of the T * use_count rows, every use_count-th is kept.
    """
    seen: list[Tensor] = []
    handle = isolate(model, site).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].reshape(-1, site.hidden))
    )
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch)
    finally:
        handle.remove()
    return torch.cat(seen)[:: site.use_count]


def _release(module: nn.Module) -> None:
    """Free the tensors of a dense FFN, wherever else they are still referred to."""
    for parameter in module.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype)


def packed_text(
    text: Packed | Sequence[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    window: int,
    tokens: int,
    seed: int,
) -> Packed:
    """Windows of documents or of files of text, in equal parts, as `factorize` takes them; windows as they are."""
    if isinstance(text, Packed):
        return text
    if tokenizer is None:
        tokenizer = _tokenizer_of(model)
    texts = evenly([part.plain(tokenizer) for part in read_parts(text)], seed)
    return pack(texts, tokenizer, fitting(window, model.config), tokens, bos=wants_bos(tokenizer))


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.name_or_path)
    except (OSError, ValueError) as error:
        raise FactorMixError(
            f"no tokenizer beside {model.name_or_path!r}; pass tokenizer=, or calibration as packed windows."
        ) from error


def _stage(site: FFNSite) -> str:
    return f"site-{site.index:03d}"


def _load_done(
    student: PreTrainedModel, specs: Mapping[FFNSite, SparseSpec], work: WorkDirectory | None
) -> dict[int, SparseFFN]:
    """Sparse FFNs of a killed run, front to back without a gap."""
    done: dict[int, SparseFFN] = {}
    for site, spec in specs.items():
        if work is None or not work.done(_stage(site)):
            break
        tensors, _ = work.load(_stage(site))
        with torch.device("meta"):
            ffn = SparseFFN(spec)
        device = next(isolate(student, site).parameters()).device
        ffn.load_state_dict({k: v.to(device) for k, v in tensors.items()}, strict=True, assign=True)
        done[site.index] = ffn.eval()
    return done


def work_directory(
    out: str | Path, config: FactorConfig, data: dict[str, str], overwrite: bool = False
) -> WorkDirectory:
    """The resumable scratch folder of a run that will write `out`: of this recipe and data, see `WorkDirectory`."""
    return WorkDirectory(Path(f"{out}.work"), {"config": config.to_dict(), "data": data}, overwrite)
