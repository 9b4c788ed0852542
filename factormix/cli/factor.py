"""`factormix factor`: a dense model and some text in, a sparse model's directory out."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel

from factormix import checkpoint
from factormix.cli import options
from factormix.cli.inspect import dense_config
from factormix.cli.models import (
    Source,
    check_compute,
    identity,
    locate,
    locate_text,
    open_model,
    open_tokenizer,
    read_config,
    text_hashes,
)
from factormix.cli.plan import describe_keep, describe_run
from factormix.cli.recipe import Recipe, merged
from factormix.cli.training import result_json
from factormix.data.text import read_documents, task_texts
from factormix.evaluate.cost import parameters_per_token
from factormix.factor.advice import export_advice
from factormix.factor.config import PRESETS, FactorConfig
from factormix.factor.factorize import factorize, work_directory
from factormix.factor.keep import keep_experts
from factormix.ffn.cost import inspect_model
from factormix.nn import SparseFFN
from factormix.run.directory import check_output
from factormix.run.errors import FactorMixError
from factormix.run.progress import say
from factormix.run.record import RunRecord, peak_memory_bytes

DEFAULT_TEXT = "asset:brown-train"
STAGES = "site-*.json"  # of the work directory, one an FFN
MEASURES = ("recall", "captured", "error_before", "error_after")


@options.config_flags(FactorConfig)
def factor(
    given: dict[str, Any],
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help=options.MODEL_HELP)] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="OUT", help="the directory to write")] = None,
    recipe: options.RecipeFile = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            metavar="|".join(PRESETS),
            help="default: chosen by measurement; paper: FactorLLM as released; the others: methods to compare with",
        ),
    ] = None,
    text: options.Text = None,
    heal_text: Annotated[
        list[str] | None, typer.Option("--heal-text", metavar="FILE", help="text for healing, else the calibration's")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="FILE", help="a task's examples: calibrate and heal on them, answers included"),
    ] = None,
    keep_experts_for: Annotated[
        str | None,
        typer.Option(
            "--keep-experts-for",
            metavar="FILE",
            help="MODEL is factored: keep, for all tokens, the experts that serve this text best; --layout S6A0E16",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="DENSE", help="the dense MODEL's origin: what the kept experts are to equal"),
    ] = None,
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    device_map: options.DeviceMap = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    quiet: options.Quiet = False,
    json: options.Json = None,
) -> None:
    """Split the FFNs of MODEL into sparse experts, fit them to the dense ones on text, and write OUT.

    With --keep-experts-for, MODEL is factored already: its experts that serve a task's text stay, for all tokens.

    A run that was killed goes on where it stopped when the same command is given again (its work is in OUT.work).
    """
    started = time.perf_counter()
    flags = {"model": model, "out": out and str(out), "preset": preset, "text": text, "heal_text": heal_text}
    flags |= {"task": task, "keep_experts_for": keep_experts_for, "against": against}
    plan = Recipe.open(recipe, merged({key: value for key, value in flags.items() if value}, given))
    if not plan.model or not plan.out:
        raise FactorMixError("factor needs MODEL and -o OUT: factormix factor MODEL -o OUT, or a recipe that has both.")
    config = plan.config
    on = check_compute(dtype, device)
    check_output(plan.out, overwrite)
    options.check_json(json)
    task_file = _task_of(plan)
    if not (plan.text or task_file):
        say(f"no --text given: calibrating on {DEFAULT_TEXT}.", quiet)
    paths = locate_text(plan.text or ([] if task_file else [DEFAULT_TEXT]), quiet)
    heal_paths, task_paths = locate_text(plan.heal_text, quiet), locate_text([task_file] if task_file else [], quiet)
    # reads all text: what is wrong with it shows before anything is computed
    data = text_hashes([*paths, *task_paths, *heal_paths])
    source, base = locate(plan.model, quiet), None if plan.against is None else locate(plan.against, quiet)
    _check(source, config, dtype, bool(plan.keep_experts_for), dry_run, quiet)
    if dry_run:
        return
    torch.manual_seed(config.seed)
    command = shlex.join(["factormix", "factor", plan.model, "-o", plan.out])
    record = RunRecord(command, plan.flat(), config.seed, dtype, on.type, data)
    with record.phase("load"):
        tokenizer = open_tokenizer(source)
        opened = open_model(source, dtype, device, device_map)
    calibration = [str(path) for path in paths]
    if task_paths:  # as documents: their answers are no part of the files' texts
        own = [text for path in paths for text in read_documents(path).plain(tokenizer)]
        calibration = [text for path in task_paths for text in task_texts(path)] + own
    known = {**data, "model": identity(source, opened.config), "dtype": dtype}
    if base is not None:
        known["against"] = identity(base, read_config(base))
    work = work_directory(plan.out, config, known, overwrite)
    if done := len(list(work.path.glob(STAGES))):
        say(f"resuming: {done} FFNs are done in {str(work.path)!r}.", quiet)
    with work.removed_if_without(STAGES), record.phase("factorize"):
        healing = [str(path) for path in heal_paths] or None
        if plan.keep_experts_for:
            teacher = None if base is None else open_model(base, dtype, device, device_map)
            sparse = keep_experts(
                opened, config, calibration, tokenizer, dense=teacher, healing=healing, work=work, quiet=quiet
            )
        else:
            sparse = factorize(
                opened, config, calibration, tokenizer,
                healing=healing, keep_dense=config.heal.tokens > 0, work=work, quiet=quiet,
            )  # fmt: skip
    made_by = sparse.config.factormix["made_by"]
    record.tokens = made_by["calibration"]["tokens"] + made_by.get("healing", {}).get("tokens", 0)
    record.metrics = _metrics(sparse, made_by)
    record.peak_memory_bytes = peak_memory_bytes(record.device)
    checkpoint.save(sparse, plan.out, tokenizer, overwrite, run=record.to_dict())
    work.remove()
    options.put_json(json, result_json(record, started, _trained(sparse, config)))
    typer.echo(_summary(record, plan.model, plan.out))


def _task_of(plan: Recipe) -> str | None:
    """The file of a task's examples: to factor for it, or to keep experts for it."""
    if plan.keep_experts_for and (plan.task or plan.text):
        raise FactorMixError(
            f"keep_experts_for {plan.keep_experts_for!r} ranks and fits on that text alone: leave text and task out."
        )
    if plan.against and not plan.keep_experts_for:
        raise FactorMixError(f"against {plan.against!r} goes with keep_experts_for; the dense model here is MODEL.")
    return plan.keep_experts_for or plan.task


def _check(source: Source, config: FactorConfig, dtype: str, keep: bool, show: bool, quiet: bool) -> None:
    """Refuse, from the config alone, a model or a layout that cannot be; print the plan where it is asked for."""
    model_config = read_config(source)
    if keep:
        lines = describe_keep(model_config, config)
    elif isinstance(model_config, checkpoint.FactorMixConfig):
        raise FactorMixError(f"{source.typed!r} is sparse already; name the dense model it was made from.")
    else:
        found = inspect_model(dense_config(model_config))
        lines = describe_run(found, config, dtype)  # does the arithmetic of the layout
        if config.shares_out and config.cut.active:
            say("note: other engines want one layout in all FFNs; to export, add --allocation uniform.", quiet)
        elif advice := export_advice(config.cut, (group.inner for group in found.groups)):
            say(f"note: {advice}", quiet)
    if show:
        typer.echo("\n".join(lines))


def _metrics(sparse: PreTrainedModel, made_by: dict[str, Any]) -> dict[str, Any]:
    sites = made_by["sites"]
    ffns = sparse.sparse_ffns().values()  # type: ignore[operator]
    # of a pruned FFN the dropped slices count too
    total = sum(
        sum(p.numel() for p in ffn.parameters()) * ffn.spec.slices / (ffn.spec.slices - ffn.spec.layout.dropped)
        for ffn in ffns
    )
    metrics: dict[str, Any] = {
        "parameters": sparse.num_parameters(),
        "parameters_per_token": parameters_per_token(sparse),
        "active_fraction": sum(ffn.active_parameters() for ffn in ffns) / total,
        **{name: sum(site[name] for site in sites) / len(sites) for name in MEASURES},
    }
    if "healing" in made_by:
        healing = made_by["healing"]
        history = healing["metrics"].get("history") or [{}]
        metrics["healing"] = {"seconds": healing["seconds"], "tokens": healing["tokens"], "last_step": history[-1]}
    return metrics


def _trained(sparse: PreTrainedModel, config: FactorConfig) -> int:
    """Parameters that a fit changed: routers; down projections by the layer fit; all by its steps or by healing."""
    names: tuple[str, ...] = ("router.",)
    if config.layer_fit:
        names += ("shared.down_proj", "experts.down_proj")
    if config.heal.tokens or (config.layer_fit and config.fit_passes):
        names = ("",)
    ffns: list[SparseFFN] = list(sparse.sparse_ffns().values())  # type: ignore[operator]
    return sum(p.numel() for ffn in ffns for name, p in ffn.named_parameters() if name.startswith(names))


def _summary(record: RunRecord, model: str, out: str) -> str:
    of = record.metrics
    seconds = sum(phase["seconds"] for phase in record.phases)
    return "\n".join([
        f"{out}: {of['parameters']:,} parameters, {of['parameters_per_token']:,} of them read for a token "
        f"({100 * of['active_fraction']:.1f} % of the FFNs)",
        f"label recall {of['recall']:.3f}, output error of an FFN {of['error_before']:.3f} before and "
        f"{of['error_after']:.3f} after the layer fit, means over FFNs",
        f"{record.tokens:,} tokens, {seconds:.0f} s, {record.peak_memory_bytes / 2**30:.2f} GiB at most",
        "next, on text that it was not calibrated on: "
        f"{shlex.join(['factormix', 'eval', out, '--against', model, '--text'])} FILE",
    ])  # fmt: skip
