"""Read and write gates: gate.json and gate.safetensors in the folder `gate/` of a directory of stage 1 or 2.

A gate's rows belong to an order of domains, and to the adapters over which they were trained. So gate.json lists the
domains in order, each with the SHA-256 of its adapter's weights. Other domains, orders and weights are refused.
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
GATE = "gate"  # name of the folder
GATE_CONFIG, GATE_WEIGHTS = "gate.json", "gate.safetensors"


def domain_hashes(folders: Mapping[str, str | Path]) -> list[dict[str, str]]:
    """[{"name", "sha256"}] of adapter directories, in order. The hash is that of the weights file.

    Raises:
        FactorMixError: a directory has no weights file.
    """
    for folder in folders.values():
        if not (Path(folder) / WEIGHTS).is_file():
            raise FactorMixError(f"{str(folder)!r} has no {WEIGHTS}, so it is no adapter directory.")
    return [{"name": name, "sha256": sha256(Path(folder) / WEIGHTS)} for name, folder in folders.items()]


def save_gates(gates: Mapping[int, DomainGate], folders: Mapping[str, str | Path], out: Path) -> None:
    """Write the gates of a model.

    Args:
        gates: the gates by site index, at least one.
        folders: the adapter directories that they weigh, by name, in the order of their weights.
        out: an existing folder.
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
    """The gates' tensors by the name "<site>.<parameter>"."""
    return {f"{i}.{name}": p.detach() for i, gate in gates.items() for name, p in gate.named_parameters()}


def read_gate_config(folder: str | Path) -> dict[str, Any]:
    """Read gate.json of a folder.

    Raises:
        FactorMixError: the file is missing, damaged, or of a newer format.
    """
    return read_json(Path(folder) / GATE_CONFIG, FORMAT_VERSION)


def check_domains(config: Mapping[str, Any], folders: Mapping[str, str | Path], where: str | Path) -> None:
    """Check that adapter directories have the names, the order and the weights over which a gate was trained.

    Args:
        config: gate.json.
        folders: adapter directories by name, in the order in which they would be loaded.
        where: the gate's folder, for the message.

    Raises:
        FactorMixError: they differ; the message names both sides.
    """
    wanted, found = config["domains"], domain_hashes(folders)
    names = [domain["name"] for domain in wanted]
    if names != list(folders):
        raise FactorMixError(
            f"the gate in {str(where)!r} weighs the domains {', '.join(names)}, in this order; received "
            f"{', '.join(folders) or 'none'}. Its rows belong to this order, so give the same domains in the same "
            "order."
        )
    for trained, given in zip(wanted, found):
        if trained["sha256"] != given["sha256"]:
            raise FactorMixError(
                f"the gate in {str(where)!r} was trained over an adapter {trained['name']!r} whose weights have "
                f"SHA-256 {trained['sha256']}; {str(folders[trained['name']])!r} has {given['sha256']}. Take the "
                "adapter it was trained over, or adapt again."
            )
