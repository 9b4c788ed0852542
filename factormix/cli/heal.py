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
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a directory that `factormix factor` wrote")],
    against: Annotated[str, typer.Option("--against", metavar="DENSE", help="the dense MODEL's origin: the teacher")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="the directory to write")],
    text: options.Text = None,
    window: Annotated[int, typer.Option("--window", help="tokens of a window", min=8)] = 512,
    seed: options.Seed = 0,
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
    config = HealConfig.from_dict(given)
    if not config.tokens:
        raise FactorMixError("heal received --tokens 0; say how much to train on, for example --tokens 300000.")
    on = check_compute(dtype, device)
    check_output(out, overwrite)
    options.check_json(json)
    if not text:
        say(f"no --text given: healing on {DEFAULT_TEXT}.", quiet)
    paths = locate_text(text or [DEFAULT_TEXT], quiet)
    data = text_hashes(paths)  # reads all text: what is wrong with it shows before anything is computed
    source, teacher = locate(model, quiet), locate(against, quiet)
    own = read_config(source)
    if not isinstance(own, checkpoint.FactorMixConfig):
        raise FactorMixError(f"{model!r} is dense, there is nothing to heal; make it sparse with `factormix factor`.")
    if dry_run:
        typer.echo(_plan(config, own))
        return
    torch.manual_seed(seed)
    command = shlex.join(["factormix", "heal", model, "--against", against, "-o", str(out)])
    values = {"model": model, "against": against, "text": text, "window": window, "seed": seed, **config.to_dict()}
    # what made MODEL counts too: `eval` tells in-domain text from foreign by it
    record = RunRecord(command, values, seed, dtype, on.type, {**(run_json(source).get("data") or {}), **data})
    known = {**data, "model": identity(source, own), "against": identity(teacher, read_config(teacher)), "dtype": dtype}
    fingerprint = {"config": config.to_dict(), "window": window, "seed": seed, "data": known}
    work = WorkDirectory(f"{out}.work", fingerprint, overwrite)
    say_resumed(work, "healing", quiet)
    with work.removed_if_without("healing/checkpoint-*"):
        with record.phase("load"):
            tokenizer = open_tokenizer(source)
            sparse = open_model(source, dtype, device, device_map)
            dense = open_model(teacher, dtype, device, device_map)
            share_frozen(sparse, dense)
            packed = packed_text([str(path) for path in paths], dense, tokenizer, window, config.tokens, seed + 1)
        made_by = sparse.config.factormix["made_by"]
        recipe, before = made_by.get("config", {}), made_by.get("healing", {})
        with record.phase("heal"):
            done = distil(
                sparse, dense, packed, config,
                label=recipe.get("label", "joint"), pa_form=recipe.get("router_loss", "pa"),
                seed=seed, work=work, quiet=quiet,
            )  # fmt: skip
    made_by["healing"] = {**done, "tokens_before": before.get("tokens", 0) + before.get("tokens_before", 0)}
    record.tokens, record.metrics = done["tokens"], done["metrics"]
    record.peak_memory_bytes = peak_memory_bytes(record.device)
    checkpoint.save(sparse, out, tokenizer, overwrite, run=record.to_dict())
    work.remove()
    result = result_json(record, started, done["params_trained"])
    options.put_json(json, result)
    last = ", ".join(f"{k} {v:.4g}" for k, v in (done["metrics"]["history"] or [{}])[-1].items() if k != "step")
    typer.echo(
        f"{out}: healed on {record.tokens:,} tokens in {result['seconds']:.0f} s, "
        f"{record.peak_memory_bytes / 2**30:.2f} GiB at most; loss at the end: {last}\n"
        f"next: {shlex.join(['factormix', 'eval', str(out), '--against', against, '--text'])} FILE"
    )


def _plan(config: HealConfig, own: checkpoint.FactorMixConfig) -> str:
    sites = own.factormix["sites"]
    return (
        f"healing {len(sites)} sparse FFNs on {config.tokens:,} tokens, {config.batch_tokens:,} a step: "
        f"{max(1, config.tokens // config.batch_tokens):,} steps, a checkpoint every {config.save_steps}"
    )
