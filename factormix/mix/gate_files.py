"""The gates as a file of their own: gate.json and gate.safetensors in one folder.

A gate's rows are bound to an order of domains and to the very adapters they were trained over. So gate.json lists the
domains in order, each with the SHA-256 of its adapter's weights, and others are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from factormix.ffn import FFNSite
from factormix.mix.adapter_files import WEIGHTS, load_adapters
from factormix.mix.peft_tuner import domain_layer
from factormix.mix.sizes import sites_of
from factormix.mix.task_adapters import check_tensors
from factormix.nn import DomainGate
from factormix.run.directory import read_json, sha256, write_json
from factormix.run.errors import FactorMixError
from factormix.run.tensors import read_tensors, write_tensors

FORMAT_VERSION = 1
GATE_CONFIG, GATE_WEIGHTS = "gate.json", "gate.safetensors"


def domain_hashes(folders: Mapping[str, str | Path]) -> list[dict[str, str]]:
    """[{"name", "sha256"}] of adapter directories, in order; the hash is of the weights' file.

    Raises:
        FactorMixError: a directory without weights.
    """
    for folder in folders.values():
        if not (Path(folder) / WEIGHTS).is_file():
            raise FactorMixError(f"{str(folder)!r} has no {WEIGHTS}, so it is no adapter directory.")
    return [{"name": name, "sha256": sha256(Path(folder) / WEIGHTS)} for name, folder in folders.items()]


def save_gates(gates: Mapping[int, DomainGate], folders: Mapping[str, str | Path], out: Path) -> None:
    """Write the gates of a model into the folder `out`, which exists.

    Args:
        gates: by site index, one or more.
        folders: the adapter directories they weigh, in their order.
    """
    first = next(iter(gates.values()))
    sites = {str(i): {"hidden": gate.hidden, "domains": list(gate.domains)} for i, gate in gates.items()}
    values = {
        "format_version": FORMAT_VERSION,
        "kind": first.kind,
        "start": first.start,
        "domains": domain_hashes(folders),
        "sites": sites,
    }
    write_json(out / GATE_CONFIG, values)
    write_tensors(out / GATE_WEIGHTS, gate_tensors(gates))


def gate_tensors(gates: Mapping[int, DomainGate]) -> dict[str, Tensor]:
    """By "<site>.<parameter>"."""
    return {f"{i}.{name}": p.detach() for i, gate in gates.items() for name, p in gate.named_parameters()}


def read_gate_config(folder: str | Path) -> dict[str, Any]:
    """gate.json of a folder.

    Raises:
        FactorMixError: absent, damaged, or of a newer format.
    """
    return read_json(Path(folder) / GATE_CONFIG, FORMAT_VERSION)


def check_domains(config: Mapping[str, Any], folders: Mapping[str, str | Path], where: str | Path) -> None:
    """Hold the domains that a gate was trained over against adapter directories, names, order and weights.

    Args:
        config: gate.json.
        folders: by name, in the order they would be loaded.
        where: of the gate, for the message.

    Raises:
        FactorMixError: names both sides.
    """
    wanted, found = config["domains"], domain_hashes(folders)
    names = [each["name"] for each in wanted]
    if names != list(folders):
        raise FactorMixError(
            f"the gate in {str(where)!r} weighs the domains {', '.join(names)}, in this order; received "
            f"{', '.join(folders) or 'none'}. Its rows are bound to the order: give the same domains in the same order."
        )
    for here, there in zip(wanted, found):
        if here["sha256"] != there["sha256"]:
            raise FactorMixError(
                f"the gate in {str(where)!r} was trained over an adapter {here['name']!r} whose weights have SHA-256 "
                f"{here['sha256']}; {str(folders[here['name']])!r} has {there['sha256']}. Take the adapter it was "
                "trained over, or adapt again."
            )


def open_adapters(
    model: PreTrainedModel, folders: Mapping[str, str | Path], gate: str | Path | None = None
) -> dict[int, DomainGate]:
    """Put saved adapters into a model and, over them, saved gates; all active and frozen.

    Args:
        model: the base, changed in place.
        folders: adapter directories by name, in the order of the gates' weights.
        gate: a folder of gates, or None for weights of 1.

    Returns:
        The gates by site index.

    Raises:
        FactorMixError: as `load_adapters` and `check_domains`; gates of other sites or shapes, or a damaged file.
    """
    if gate is None:
        load_adapters(model, folders)
        return {}
    config, sites = read_gate_config(gate), sites_of(model)
    check_domains(config, folders, gate)
    load_adapters(model, folders)
    gates = put_gates(model, sites, list(folders), config["kind"], config["start"])
    fill_gates(gates, gate)
    for each in gates.values():
        each.requires_grad_(False).eval()
    return gates


def put_gates(
    model: nn.Module, sites: Sequence[FFNSite], domains: Sequence[str], kind: str, start: str
) -> dict[int, DomainGate]:
    """A fresh gate at every site that has an adapter, over the domains that have one there; by site index.

    Args:
        model: with adapters.
        sites: its FFNs, found before the adapters stood beside them.
        domains: in the order of the weights.
        kind, start: see `DomainGate`.
    """
    gates = {}
    for site in sites:
        layer = domain_layer(model, site)
        if layer is not None:
            here = [domain for domain in domains if domain in layer.mixda_adapters]
            gate = DomainGate(site.hidden, here, cast(Any, kind), cast(Any, start))
            layer.set_gate(gate.to(next(layer.base_layer.parameters()).device))
            gates[site.index] = gate
    return gates


@torch.no_grad()
def fill_gates(gates: Mapping[int, DomainGate], folder: str | Path) -> None:
    """Take saved gates.

    Raises:
        FactorMixError: gates of other sites or shapes, or a damaged file.
    """
    file = Path(folder) / GATE_WEIGHTS
    tensors, wanted = read_tensors(file), gate_tensors(gates)
    check_tensors(wanted, tensors, f"gate {str(file)!r}")
    for name, tensor in wanted.items():
        tensor.copy_(tensors[name])
