"""`factormix inject`: a model and a domain's knowledge in, a domain adapter's directory out (MixDA, stage 1)."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from factormix.cli import options
from factormix.cli.models import (
    Source,
    check_compute,
    empty,
    identity,
    locate,
    locate_text,
    open_model,
    open_tokenizer,
    read_config,
    text_hashes,
)
from factormix.cli.recipe import InjectRecipe, merged
from factormix.cli.training import result_json, say_resumed
from factormix.data.packing import fitting
from factormix.mix.config import InjectConfig
from factormix.run.directory import check_output
from factormix.run.errors import FactorMixError
from factormix.run.progress import say
from factormix.run.record import RunRecord, peak_memory_bytes
from factormix.run.workdir import WorkDirectory
from factormix.train import step_tokens

if TYPE_CHECKING:
    from factormix.mix.retrieve import TextEncoder


@options.config_flags(InjectConfig)
def inject(
    given: dict[str, Any],
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help=options.MODEL_HELP)] = None,
    domain: Annotated[str | None, typer.Option("--domain", metavar="NAME", help="the adapter's name")] = None,
    knowledge: Annotated[
        list[str] | None,
        typer.Option("--knowledge", metavar="FILE", help="text of the domain, or facts as {prompt, targets}; repeat"),
    ] = None,
    retain: Annotated[
        list[str] | None, typer.Option("--retain", metavar="FILE", help="general text, for the old knowledge; repeat")
    ] = None,
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
    """Train a domain adapter beside the frozen FFNs of MODEL, and write it as PEFT's directory.

    A run that was killed goes on where it stopped when the same command is given again (its work is in DIR.work).
    """
    from factormix.mix import adapter_files, batches, masked_head, own_gate, retrieve, stage1  # they import PEFT

    started = time.perf_counter()
    flags = {"model": model, "domain": domain, "out": out and str(out), "knowledge": knowledge, "retain": retain}
    run = InjectRecipe.open(recipe, merged({key: value for key, value in flags.items() if value}, given))
    if not (run.model and run.domain and run.out and run.knowledge and run.retain):
        raise FactorMixError(
            "inject needs MODEL, --domain NAME, --knowledge FILE, --retain FILE and -o DIR, or a recipe that has them."
        )
    config = run.config
    adapter_files.check_domain(run.domain)
    on = check_compute(dtype, device)
    check_output(run.out, overwrite)
    options.check_json(json)
    paths, general = locate_text(run.knowledge, quiet), locate_text(run.retain, quiet)
    data = text_hashes([*paths, *general])  # reads all text: what is wrong with it shows before anything is computed
    source = locate(run.model, quiet)
    retriever = locate(config.retriever, quiet) if config.retain_by == "nearest" else None
    unfilled = empty(read_config(source))
    sizes, headless = stage1.plan(unfilled, config), masked_head.needs_head(unfilled)
    window = fitting(config.window, unfilled.config)
    if dry_run:
        typer.echo(f"{run.domain}: {sizes}\n{_budget(config, headless, window)}")
        return
    say(f"{run.domain}: {sizes}", quiet)
    torch.manual_seed(config.seed)
    command = shlex.join(["factormix", "inject", run.model, "--domain", run.domain, "-o", run.out])
    record = RunRecord(command, run.flat(), config.seed, dtype, on.type, data)
    with record.phase("load"):
        tokenizer = open_tokenizer(source)
        base = open_model(source, dtype, device, device_map)
        micro = batches.stage1_batches(
            paths, [str(path) for path in general], tokenizer,
            window=window, tokens=config.tokens, seed=config.seed,
            general_tokens=_general_tokens(config, headless), old_every=config.old_every,
        )  # fmt: skip
    held = micro.distinct * micro.tokens
    if held < config.tokens:
        say(f"the knowledge fills {held:,} tokens; it is read {config.tokens / held:.1f} times.", quiet)
    known = {**data, "model": identity(source, base.config), "dtype": dtype}
    if retriever is not None:
        known["retriever"] = identity(retriever, read_config(retriever))
    fingerprint = {"config": config.to_dict(), "domain": run.domain, "data": known}
    work = WorkDirectory(f"{run.out}.work", fingerprint, overwrite)
    say_resumed(work, "head" if headless and not work.done("head") else "stage1", quiet)
    head, of_head = None, dict[str, Any]()
    with work.removed_if_without("*/checkpoint-*" if retriever is None else "passages.json"):
        if retriever is not None:
            with record.phase("retrieve"):
                micro.beside = retrieve.nearest(
                    micro, tokenizer, lambda: _text_encoder(retriever, device), work=work, quiet=quiet
                )
        if headless:
            with record.phase("head"):
                head, of_head = masked_head.train_head(base, micro.general, config, tokenizer, work=work, quiet=quiet)
        with record.phase("train"):
            adapted, done = stage1.inject(base, run.domain, micro, config, tokenizer, head=head, work=work, quiet=quiet)
        gates = None
        if config.gate_tokens:
            with record.phase("gate"):
                gates = own_gate.fit_own_gate(adapted, run.domain, micro, config.gate_tokens)
    if head is not None:
        done["metrics"]["head"] = of_head
    if retriever is not None:
        done["metrics"]["passages"] = {"used": len(set(micro.beside)), "of": len(micro.general)}
    record.tokens, record.metrics = done["tokens"], done["metrics"]
    record.peak_memory_bytes = peak_memory_bytes(record.device)
    adapter_files.save_adapter(
        adapted, run.domain, run.out, run.model, overwrite, run=record.to_dict(), head=head, gates=gates
    )
    work.remove()
    result = result_json(record, started, done["params_trained"])
    options.put_json(json, result)
    typer.echo(_summary(run, source, result, base.can_generate()))


def _general_tokens(config: InjectConfig, headless: bool) -> int:
    """Tokens of general text to read: those that L_S, a head or a choice of passages needs."""
    from factormix.mix.retrieve import POOL

    pool = (POOL if config.retain_by == "nearest" else 1) * config.tokens // config.old_every
    return max(pool, config.head_tokens) if headless else pool


def _text_encoder(source: Source, device: str) -> TextEncoder:
    from factormix.mix.retrieve import TextEncoder

    return TextEncoder(open_model(source, "float32", device), open_tokenizer(source))


def _budget(config: InjectConfig, headless: bool, window: int) -> str:
    step = step_tokens(config.batch_tokens, window)
    old = "without L_S"
    if config.old_knowledge != "none":
        old = f"L_S {config.old_knowledge} on {config.tokens // config.old_every:,} tokens of general text"
    if config.old_knowledge != "none" and config.retain_by == "nearest":
        old += f", the nearest by {config.retriever}"
    first = f"first a masked-LM head on {config.head_tokens:,} general tokens; " if headless else ""
    return f"{first}{config.tokens // step * step:,} tokens of knowledge, {step:,} a step; {old}"


def _summary(run: InjectRecipe, source: Source, result: dict[str, Any], causal: bool) -> str:
    adapter, last = result["metrics"]["adapter"], dict[str, float]()
    for step in result["metrics"]["history"]:
        last |= step  # not every step has an L_S
    parts = ", ".join(f"{name} {value:.4g}" for name, value in last.items() if name != "step")
    adapter_dir, model = str(run.out), source.typed
    if causal:
        words = ["factormix", "eval", model, "--adapter", adapter_dir, "--against", model, "--text"]
        then = f"next, on text of the domain that it was not taught: {shlex.join(words)} FILE"
    else:
        words = ["factormix", "adapt", model, "--domains", adapter_dir, "--task"]
        then = f"next: {shlex.join(words)} FILE --dev FILE -o DIR"
    return "\n".join([
        f"{run.out}: {adapter['parameters']:,} parameters ({100 * adapter['share']:.2f} % of the model), width "
        f"{adapter['width']} at layers {', '.join(map(str, adapter['layers']))}",
        f"{result['tokens']:,} tokens of knowledge, {result['seconds']:.0f} s, "
        f"{result['peak_bytes'] / 2**30:.2f} GiB at most; loss at the end: {parts}",
        then,
    ])  # fmt: skip
