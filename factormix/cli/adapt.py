"""`factormix adapt`: a base, domain adapters and a task in, a stage-2 directory out (MixDA, stage 2)."""

from __future__ import annotations

import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from factormix.cli import options
from factormix.cli.models import (
    Source,
    by_name,
    check_compute,
    identity,
    locate,
    locate_text,
    open_model,
    open_tokenizer,
    read_config,
)
from factormix.cli.recipe import AdaptRecipe, merged
from factormix.cli.training import result_json, say_resumed
from factormix.data.labelled import Labelled
from factormix.data.text import Documents
from factormix.mix.adapt_config import AdaptConfig
from factormix.run.directory import check_output
from factormix.run.errors import FactorMixError
from factormix.run.progress import say
from factormix.run.record import RunRecord, peak_memory_bytes
from factormix.run.workdir import WorkDirectory

if TYPE_CHECKING:
    from factormix.mix.mix_model import MixModel
    from factormix.mix.task import Task


@dataclass(frozen=True)
class _Data:
    """What the files hold; test and dev may be absent."""

    train: Labelled | Documents
    dev: Labelled | Documents | None
    test: Labelled | Documents | None

    @property
    def hashes(self) -> dict[str, str]:
        parts = {"train": self.train, "dev": self.dev, "test": self.test}
        return {name: part.sha256 for name, part in parts.items() if part is not None}


@options.config_flags(AdaptConfig)
def adapt(
    given: dict[str, Any],
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help=options.MODEL_HELP)] = None,
    domains: Annotated[
        str | None,
        typer.Option("--domains", metavar="DIR,DIR", help="adapter directories, in order; none: a baseline without"),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="FILE", help="labelled .jsonl, prompts with targets, or plain text to train on"),
    ] = None,
    dev: Annotated[
        str | None,
        typer.Option("--dev", metavar="FILE", help="to choose the best checkpoint on; with --shots optional"),
    ] = None,
    test: Annotated[str | None, typer.Option("--test", metavar="FILE", help="scored once, at the end")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="the directory to write")] = None,
    recipe: options.RecipeFile = None,
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    device_map: options.DeviceMap = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    quiet: options.Quiet = False,
    json: options.Json = None,
) -> None:
    """Train gates, a task adapter and a head above frozen domain adapters of MODEL, and write a stage-2 directory.

    A run that was killed goes on where it stopped when the same command is given again (its work is in DIR.work).
    """
    from factormix.mix import gate_files, load, stage2, task_adapters  # they import PEFT, others do without

    started = time.perf_counter()
    asked = {"model": model, "task": task, "dev": dev, "test": test, "out": out and str(out)}
    asked_domains = {"domains": [part for part in domains.split(",") if part]} if domains else {}
    flags = {key: value for key, value in asked.items() if value}
    run = AdaptRecipe.open(recipe, merged({**flags, **asked_domains}, given))
    if not (run.model and run.task and run.out):
        raise FactorMixError("adapt needs MODEL, --task FILE and -o DIR, or a recipe that has them.")
    config = run.config
    on = check_compute(dtype, device)
    check_output(run.out, overwrite)
    options.check_json(json)
    folders = _folders(run.domains)
    hashes = {each["name"]: each["sha256"] for each in gate_files.domain_hashes(folders)}
    data = _read(run, quiet)
    train, held = stage2.choose_examples(data.train, data.dev, config)
    source = locate(run.model, quiet)
    read_config(source)
    kind = train.kind if isinstance(train, Labelled) else "causal-lm" if train.kind == "knowledge" else "text"
    spec = task_adapters.TaskAdapterSpec.of_config(config, str(kind))
    plan = f"{kind}: {len(train)} examples to train on, {len(held)} to choose on; task adapter {spec.kind}"
    plan += f", {config.gate_kind} gates over {', '.join(folders)}" if folders else ", no domains"
    if dry_run:
        typer.echo(plan)
        return
    say(plan, quiet)
    command = shlex.join(["factormix", "adapt", run.model, "--domains", ",".join(run.domains), "--task", run.task])
    record = RunRecord(command, run.flat(), config.seed, dtype, on.type, {**data.hashes, **hashes})
    with record.phase("load"):
        torch.manual_seed(config.seed)
        tokenizer = open_tokenizer(source)
        base = open_model(source, dtype, device, device_map)
        known = identity(source, base.config)
    fingerprint = {"config": config.to_dict(), "data": {**data.hashes, "model": known, "dtype": dtype}}
    work = WorkDirectory(f"{run.out}.work", {**fingerprint, "domains": list(hashes.items())}, overwrite)
    say_resumed(work, "stage2", quiet)
    with work.removed_if_without("stage2/checkpoint-*"):
        with record.phase("train"):
            mix, learned, done = stage2.adapt(
                base, folders, train, held, _drawn(config), tokenizer, work=work, quiet=quiet
            )
        if data.test is not None:
            with record.phase("test"):
                done["metrics"]["test"] = _test(mix, learned, data.test, tokenizer, config)
    record.tokens, record.metrics = done["tokens"], done["metrics"]
    record.peak_memory_bytes = peak_memory_bytes(record.device)
    load.save_mix(
        mix, learned, folders, run.out, base=_base(source, run.out, known), overwrite=overwrite, run=record.to_dict()
    )
    work.remove()
    result = result_json(record, started, done["params_trained"])
    options.put_json(json, result)
    typer.echo(_summary(run.out, learned, result))


def _folders(domains: list[str]) -> dict[str, Path]:
    """Adapter directories by their names, which name the domains."""
    from factormix.mix.adapter_files import check_domain

    folders = by_name("--domains", domains)
    for name, folder in folders.items():
        check_domain(name)
        if not folder.is_dir():
            raise FactorMixError(f"domain {str(folder)!r} is no directory; make it with `factormix inject`.")
    return folders


def _read(run: AdaptRecipe, quiet: bool) -> _Data:
    """All files: what is wrong with them shows before anything is computed."""
    from factormix.mix.examples import read_examples

    def read(name: str | None) -> Labelled | Documents | None:
        return None if name is None else read_examples(locate_text([name], quiet)[0], run.config.task_kind)

    train, dev, test = read(run.task), read(run.dev), read(run.test)
    assert train is not None  # adapt asked for it
    if test is not None and test.kind != train.kind:
        raise FactorMixError(f"{train.name} is {train.kind} and {test.name} is {test.kind}; give one kind.")
    return _Data(train, dev, test)


def _drawn(config: AdaptConfig) -> AdaptConfig:
    """The config for examples that have been drawn already."""
    return config.replace(shots=None)


def _test(mix: MixModel, task: Task, test: Labelled | Documents, tokenizer: Any, config: AdaptConfig) -> dict[str, Any]:
    from factormix.mix.examples import LanguageBatches, encode
    from factormix.mix.score import TaskLoss, score_examples, score_language

    if isinstance(test, Labelled):
        task.check_labels(test)
        pad = tokenizer.pad_token_id or 0
        return score_examples(mix, encode(test, tokenizer, task), test.labels or [], task, pad, config.batch_size)
    batches = LanguageBatches(test, tokenizer, task.window, config.tokens, 1, config.seed)
    return score_language(mix, batches, TaskLoss(mix, task, tokenizer.mask_token_id))


def _base(source: Source, out: str, known: str) -> dict[str, Any]:
    """How `predict` finds the base again: what was typed, for a local one its path from the directory, and its hash."""
    typed = source.typed
    local = not source.hub and not typed.startswith("asset:")
    path = os.path.relpath(Path(typed).resolve(), Path(out).resolve()) if local else None
    return {"model": typed if path is None else Path(typed).name, "path": path, "identity": known}


def _summary(out: str, task: Task, result: dict[str, Any]) -> str:
    metrics, count = result["metrics"], result["metrics"]["parameters"]
    parts = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in count.items())
    lines = [f"{out}: {result['params_trained']:,} parameters trained ({parts})"]
    for name in ("dev", "test"):
        if name in metrics:
            of = metrics[name]
            said = ", ".join(f"{k} {v:.4g}" for k, v in of.items() if k not in ("n", "gates"))
            lines.append(f"{name}, {of['n']:,}: {said}")
            if weights := of["gates"]["mean"]:
                lines.append("  mean weights: " + ", ".join(f"{domain} {w:.3f}" for domain, w in weights.items()))
    lines.append(
        f"best after step {metrics['best_step']} of {metrics['steps']} by {task.metric}; {result['seconds']:.0f} s, "
        f"{result['peak_bytes'] / 2**30:.2f} GiB at most"
    )
    if task.kind != "text":
        lines.append(
            f"next: {shlex.join(['factormix', 'predict', '--mix', out, '--input', 'x.jsonl', '-o', 'y.jsonl'])}"
        )
    return "\n".join(lines)
