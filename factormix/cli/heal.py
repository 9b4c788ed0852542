"""`factormix heal`: a sparse model and the dense one it was made from in, the sparse model trained further out."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from factormix import checkpoint
from factormix.cli import options
from factormix.cli.factor import DEFAULT_TEXT
from factormix.cli.models import (
    check_compute,
    identity,
    locate,
    locate_text,
    open_model,
    open_tokenizer,
    read_config,
    run_json,
    text_hashes,
)
from factormix.cli.plan import describe_healing
from factormix.cli.recipe import HealRecipe, merged
from factormix.cli.training import result_json, say_resumed
from factormix.factor.config import HealConfig
from factormix.factor.factorize import packed_text
from factormix.factor.heal import heal as distil
from factormix.factor.heal import share_frozen
from factormix.run.directory import check_output
from factormix.run.errors import FactorMixError
from factormix.run.progress import say
from factormix.run.record import RunRecord, peak_memory_bytes
from factormix.run.workdir import WorkDirectory


@options.config_flags(HealConfig)
def heal(
    given: dict[str, Any],
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="a directory that `factormix factor` wrote")
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="DENSE", help="the dense MODEL's origin: the teacher")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="OUT", help="the directory to write")] = None,
    recipe: options.RecipeFile = None,
    text: options.Text = None,
    window: Annotated[int | None, typer.Option("--window", help="tokens of a window [512]", min=8)] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="of everything random [0]")] = None,
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    device_map: options.DeviceMap = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    quiet: options.Quiet = False,
    json: options.Json = None,
) -> None:
    """Distil the sparse MODEL further from the DENSE one, and write OUT.

    A run that was killed goes on where it stopped when the same command is given again (its work is in OUT.work).
    """
    started = time.perf_counter()
    flags = {"model": model, "against": against, "out": out and str(out), "text": text, "window": window, "seed": seed}
    run = HealRecipe.open(recipe, merged({key: value for key, value in flags.items() if value is not None}, given))
    if not (run.model and run.against and run.out):
        raise FactorMixError("heal needs MODEL, --against DENSE and -o OUT, or a recipe that has them.")
    config = run.config
    if not config.tokens:
        raise FactorMixError("heal received --tokens 0; say how much to train on, for example --tokens 300000.")
    on = check_compute(dtype, device)
    check_output(run.out, overwrite)
    options.check_json(json)
    if not run.text:
        say(f"no --text given: healing on {DEFAULT_TEXT}.", quiet)
    paths = locate_text(run.text or [DEFAULT_TEXT], quiet)
    data = text_hashes(paths)  # reads all text: what is wrong with it shows before anything is computed
    source, teacher = locate(run.model, quiet), locate(run.against, quiet)
    own, of_teacher = read_config(source), read_config(teacher)
    plan = describe_healing(own, of_teacher, config, run.window, dtype)  # refuses a dense MODEL
    if dry_run:
        typer.echo("\n".join(plan))
        return
    torch.manual_seed(run.seed)
    command = shlex.join(["factormix", "heal", run.model, "--against", run.against, "-o", run.out])
    # what made MODEL counts too: `eval` tells in-domain text from foreign by it
    record = RunRecord(command, run.flat(), run.seed, dtype, on.type, {**(run_json(source).get("data") or {}), **data})
    known = {**data, "model": identity(source, own), "against": identity(teacher, of_teacher), "dtype": dtype}
    fingerprint = {"config": config.to_dict(), "window": run.window, "seed": run.seed, "data": known}
    work = WorkDirectory(f"{run.out}.work", fingerprint, overwrite)
    say_resumed(work, "healing", quiet)
    with work.removed_if_without("healing/checkpoint-*"):
        with record.phase("load"):
            tokenizer = open_tokenizer(source)
            sparse = open_model(source, dtype, device, device_map)
            dense = open_model(teacher, dtype, device, device_map)
            share_frozen(sparse, dense)
            files = [str(path) for path in paths]
            packed = packed_text(files, dense, tokenizer, run.window, config.tokens, run.seed + 1)
        made_by = sparse.config.factormix["made_by"]
        factored, before = made_by.get("config", {}), made_by.get("healing", {})
        with record.phase("heal"):
            done = distil(
                sparse, dense, packed, config,
                label=factored.get("label", "joint"), pa_form=factored.get("router_loss", "pa"),
                seed=run.seed, work=work, quiet=quiet,
            )  # fmt: skip
    made_by["healing"] = {**done, "tokens_before": before.get("tokens", 0) + before.get("tokens_before", 0)}
    record.tokens, record.metrics = done["tokens"], done["metrics"]
    record.peak_memory_bytes = peak_memory_bytes(record.device)
    checkpoint.save(sparse, run.out, tokenizer, overwrite, run=record.to_dict())
    work.remove()
    result = result_json(record, started, done["params_trained"])
    options.put_json(json, result)
    last = ", ".join(f"{k} {v:.4g}" for k, v in (done["metrics"]["history"] or [{}])[-1].items() if k != "step")
    typer.echo(
        f"{run.out}: healed on {record.tokens:,} tokens in {result['seconds']:.0f} s, "
        f"{record.peak_memory_bytes / 2**30:.2f} GiB at most; loss at the end: {last}\n"
        f"next: {shlex.join(['factormix', 'eval', run.out, '--against', run.against, '--text'])} FILE"
    )
