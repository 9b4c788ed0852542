"""A stage-2 directory: written whole or not at all, and loaded onto a base with everything it names.

    gate/               gate.json, gate.safetensors: domains in order with their hashes (absent without domains)
    task_adapter/       PEFT's two files for LoRA and prefix; task_adapter.json and .safetensors for bottlenecks
    head.safetensors    weight, bias (absent for language tasks)
    task.json           task, labels, metric, base, domains in order by relative path and hash, hash of every file above
    run.json            what made it

The base and the domain adapters stay where they are: the directory holds what stage 2 trained, and nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from factormix.mix.adapter_files import CONFIG as PEFT_CONFIG
from factormix.mix.adapter_files import WEIGHTS as PEFT_WEIGHTS
from factormix.mix.gate_files import (
    GATE,
    check_domains,
    domain_hashes,
    read_gate_config,
    save_gates,
)
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
    """Write a stage-2 directory, atomically.

    Args:
        mix: what `adapt` returned.
        task: the same.
        domains: the adapter directories that `mix` was made with.
        path: the directory.
        base: {"model", "identity"}: how a reader finds the base, and a hash to know it by; recorded, not checked here.
        overwrite: replace what is there.
        run: what made it, written as run.json.

    Raises:
        FactorMixError: an existing directory, a full disk.
    """
    target = Path(path).resolve()
    with output_directory(path, overwrite) as folder:
        if mix.gates:
            (folder / GATE).mkdir()
            save_gates(mix.gates, domains, folder / GATE)
        if mix.task_adapter.spec.kind != "none":
            (folder / TASK_ADAPTER).mkdir()
            _save_task_adapter(mix, folder / TASK_ADAPTER)
        if mix.head is not None:
            write_tensors(folder / HEAD, mix.head.state_dict())
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        places = {name: os.path.relpath(Path(domain).resolve(), target) for name, domain in domains.items()}
        values = {
            "format_version": FORMAT_VERSION,
            "task": task.to_dict(),
            "base": dict(base or {}),
            "domains": [{**each, "path": places[each["name"]]} for each in domain_hashes(domains)],
            "task_adapter": asdict(mix.task_adapter.spec),
            "files": {str(file.relative_to(folder)): sha256(file) for file in files},
        }
        write_json(folder / TASK, values)
        if run is not None:
            write_json(folder / "run.json", run)


def read_task(path: str | Path) -> dict[str, Any]:
    """task.json of a stage-2 directory, whose files are all there and unaltered.

    Raises:
        FactorMixError: names the file that is missing, altered or damaged.
    """
    folder = Path(path)
    values = read_json(folder / TASK, FORMAT_VERSION)
    check_hashes(folder, values["files"], TASK)
    return values


def task_in(values: Mapping[str, Any]) -> Task:
    """The task that task.json describes."""
    return Task(**{name: value for name, value in values["task"].items() if name != "metric"})


def domain_folders(path: str | Path, values: Mapping[str, Any]) -> dict[str, Path]:
    """The adapter directories that task.json names, relative to the stage-2 directory, in order.

    Raises:
        FactorMixError: one is not there.
    """
    folders = {each["name"]: Path(os.path.normpath(Path(path).resolve() / each["path"])) for each in values["domains"]}
    for name, folder in folders.items():
        if not folder.is_dir():
            raise FactorMixError(
                f"domain {name!r} of {str(path)!r} should be at {str(folder)!r}, and is not. Put its adapter there."
            )
    return folders


def load_mix(
    path: str | Path,
    model: PreTrainedModel,
    domains: Mapping[str, str | Path] | None = None,
    trainable: bool = False,
) -> tuple[MixModel, Task]:
    """Load everything of a stage-2 directory onto its base: domain adapters, gates, task adapter, head.

    Args:
        path: the directory.
        model: the base, changed in place.
        domains: adapter directories by name, in order, where they have moved; by default those task.json names.
        trainable: let what stage 2 trained train again.

    Raises:
        FactorMixError: a file missing, altered or damaged; domains in another order or with other weights; another
            base than it was made from.
    """
    folder, values = Path(path), read_task(path)
    folders = dict(domains) if domains is not None else domain_folders(path, values)
    start: dict[str, str] = {}
    if values["domains"]:
        gates = read_gate_config(folder / GATE)
        check_domains(gates, folders, folder / GATE)
        start = {"gate": gates["kind"], "start": gates["start"]}
    elif folders:
        raise FactorMixError(f"{str(path)!r} was made without domains; received {', '.join(folders)}. Give none.")
    task, spec = task_in(values), TaskAdapterSpec(**values["task_adapter"])
    mix = MixModel(model, folders, spec, task.outputs, task.pooling, **start)
    if mix.gates:
        fill_gates(mix.gates, folder / GATE)
    if spec.kind != "none":
        mix.task_adapter.fill(read_tensors(folder / TASK_ADAPTER / _adapter_files(spec.kind)[1]))
    if mix.head is not None:
        head = read_tensors(folder / HEAD)
        check_tensors({n: p.detach() for n, p in mix.head.named_parameters()}, head, f"head {str(folder / HEAD)!r}")
        with torch.no_grad():
            mix.head.load_state_dict(head)
    mix.set_trainable(trainable)
    mix.assert_trainable(trainable, "after load")
    return mix.eval(), task


def _adapter_files(kind: str) -> tuple[str, str]:
    """Names of config and weights."""
    return (
        (PEFT_CONFIG, PEFT_WEIGHTS) if kind in ("lora", "prefix") else ("task_adapter.json", "task_adapter.safetensors")
    )


def _save_task_adapter(mix: MixModel, folder: Path) -> None:
    adapter = mix.task_adapter
    config, weights = _adapter_files(adapter.spec.kind)
    if adapter.spec.kind in ("lora", "prefix"):
        adapter.config.save_pretrained(str(folder))  # type: ignore[operator, union-attr]
        values = json.loads((folder / config).read_text(encoding="utf-8"))
        values |= {"base_model_name_or_path": None, "inference_mode": True}
        write_json(folder / config, values)
    else:
        write_json(folder / config, asdict(adapter.spec))
    write_tensors(folder / weights, adapter.tensors())
