"""Write a stage-2 directory, completely or not at all, and load it onto a base.

    gate/               gate.json, gate.safetensors: domains in order with their hashes (absent without domains)
    task_adapter/       PEFT's two files for LoRA and prefix; task_adapter.json and .safetensors for bottlenecks
    head.safetensors    weight, bias (absent for language tasks)
    task.json           task, labels, metric, base, domains in order by relative path and hash, hash of every file above
    run.json            the record of the run

The directory holds only the parts that stage 2 trained. The base and the domain adapters stay where they are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from factormix.mix.gate_files import GATE, check_domains, domain_hashes, read_gate_config, save_gates
from factormix.mix.gated import fill_gates
from factormix.mix.mix_model import MixModel
from factormix.mix.task import Task
from factormix.mix.task_adapters import TaskAdapterSpec, check_tensors
from factormix.run.directory import check_hashes, output_directory, read_json, sha256, write_json
from factormix.run.errors import FactorMixError
from factormix.run.tensors import read_tensors, write_tensors

FORMAT_VERSION = 1
TASK, HEAD = "task.json", "head.safetensors"
TASK_ADAPTER = "task_adapter"


def save_mix(
    mix: MixModel,
    task: Task,
    domains: Mapping[str, str | Path],
    path: str | Path,
    *,
    base: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    run: Mapping[str, Any] | None = None,
) -> None:
    """Write a stage-2 directory. If writing fails, nothing is left of it.

    Args:
        mix: the model that `adapt` returned.
        task: the task that `adapt` returned.
        domains: the adapter directories that `mix` was made with, by name.
        path: the directory to write.
        base: {"model", "identity"}: the name under which a reader finds the base, and its hash. They are recorded, but
            not checked here.
        overwrite: replace an existing directory.
        run: the record of the run, written as run.json.

    Raises:
        FactorMixError: the directory exists and `overwrite` is False, or the disk is full.
    """
    target = Path(path).resolve()
    with output_directory(path, overwrite) as folder:
        if mix.gates:
            (folder / GATE).mkdir()
            save_gates(mix.gates, domains, folder / GATE)
        if mix.task_adapter.spec.kind != "none":
            (folder / TASK_ADAPTER).mkdir()
            mix.task_adapter.write_config(folder / TASK_ADAPTER)
            write_tensors(folder / TASK_ADAPTER / mix.task_adapter.files[1], mix.task_adapter.tensors())
        if mix.head is not None:
            write_tensors(folder / HEAD, mix.head.state_dict())
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        places = {name: os.path.relpath(Path(domain).resolve(), target) for name, domain in domains.items()}
        values = {
            "format_version": FORMAT_VERSION,
            "task": task.to_dict(),
            "base": dict(base or {}),
            "domains": [{**domain, "path": places[domain["name"]]} for domain in domain_hashes(domains)],
            "task_adapter": asdict(mix.task_adapter.spec),
            "files": {str(file.relative_to(folder)): sha256(file) for file in files},
        }
        write_json(folder / TASK, values)
        if run is not None:
            write_json(folder / "run.json", run)


def read_task(path: str | Path) -> dict[str, Any]:
    """Read task.json of a stage-2 directory, and check the hashes of all its files.

    Raises:
        FactorMixError: a file is missing, altered or damaged; the message names it.
    """
    folder = Path(path)
    values = read_json(folder / TASK, FORMAT_VERSION)
    check_hashes(folder, values["files"], TASK)
    return values


def task_in(values: Mapping[str, Any]) -> Task:
    """The task that task.json describes."""
    return Task(**{name: value for name, value in values["task"].items() if name != "metric"})


def domain_folders(path: str | Path, values: Mapping[str, Any]) -> dict[str, Path]:
    """The adapter directories that task.json names relative to the stage-2 directory, in order.

    Args:
        path: the stage-2 directory.
        values: its task.json.

    Raises:
        FactorMixError: a directory does not exist.
    """
    here = Path(path).resolve()
    folders = {domain["name"]: Path(os.path.normpath(here / domain["path"])) for domain in values["domains"]}
    for name, folder in folders.items():
        if not folder.is_dir():
            raise FactorMixError(
                f"domain {name!r} of {str(path)!r} should be at {str(folder)!r}, but is not. Put its adapter there."
            )
    return folders


def load_mix(
    path: str | Path,
    model: PreTrainedModel,
    domains: Mapping[str, str | Path] | None = None,
    trainable: bool = False,
) -> tuple[MixModel, Task]:
    """Load a stage-2 directory onto its base: domain adapters, gates, task adapter and head.

    Args:
        path: the stage-2 directory.
        model: the base, changed in place.
        domains: adapter directories by name, in order, if they have moved. By default those that task.json names.
        trainable: make the parameters that stage 2 trained trainable again.

    Returns:
        The model in eval mode, and its task.

    Raises:
        FactorMixError: a file is missing, altered or damaged; the domains are in another order or have other weights;
            or the base is another one.
    """
    folder, values = Path(path), read_task(path)
    folders = dict(domains) if domains is not None else domain_folders(path, values)
    start: dict[str, str] = {}
    if values["domains"]:
        gates = read_gate_config(folder / GATE)
        check_domains(gates, folders, folder / GATE)
        start = {"gate": gates["kind"], "start": gates["start"]}
    elif folders:
        raise FactorMixError(f"{str(path)!r} was made without domains, but received {', '.join(folders)}. Give none.")
    task, spec = task_in(values), TaskAdapterSpec(**values["task_adapter"])
    mix = MixModel(model, folders, spec, task.outputs, task.pooling, **start)
    if mix.gates:
        fill_gates(mix.gates, folder / GATE)
    if spec.kind != "none":
        mix.task_adapter.fill(read_tensors(folder / TASK_ADAPTER / mix.task_adapter.files[1]))
    if mix.head is not None:
        head = read_tensors(folder / HEAD)
        check_tensors({n: p.detach() for n, p in mix.head.named_parameters()}, head, f"head {str(folder / HEAD)!r}")
        with torch.no_grad():
            mix.head.load_state_dict(head)
    mix.set_trainable(trainable)
    mix.assert_trainable(trainable, "after load")
    return mix.eval(), task
