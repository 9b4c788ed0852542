"""The gates as a file of their own: gate.json and gate.safetensors in one folder, `gate/` of what stage 1 or 2 wrote.

A gate's rows are bound to an order of domains and to the very adapters they were trained over. So gate.json lists the
domains in order, each with the SHA-256 of its adapter's weights, and others are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from torch import Tensor

from factormix.nn import DomainGate
from factormix.run.directory import read_json, sha256, write_json
from factormix.run.errors import FactorMixError
from factormix.run.tensors import write_tensors

FORMAT_VERSION = 1
GATE = "gate"  # the folder's name
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
