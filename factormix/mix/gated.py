"""Load saved adapters into a model, and gates over them: those of stage 2, or each adapter's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from factormix.ffn import FFNSite
from factormix.mix.adapter_files import load_adapters
from factormix.mix.gate_files import GATE, GATE_WEIGHTS, check_domains, domain_hashes, gate_tensors, read_gate_config
from factormix.mix.peft_tuner import domain_layer
from factormix.mix.task_adapters import check_tensors
from factormix.nn import DomainGate, sites_of
from factormix.run.errors import FactorMixError
from factormix.run.tensors import read_tensors

OWN = "own"  # given instead of a gate's folder: take each adapter's own gate


def open_adapters(
    model: PreTrainedModel, folders: Mapping[str, str | Path], gate: str | Path | None = None
) -> dict[int, DomainGate]:
    """Load saved adapters into a model, and saved gates over them. All are active and frozen.

    Args:
        model: the base, changed in place.
        folders: adapter directories by name, in the order of the gates' weights.
        gate: a folder of gates, "own" for each adapter's own gate, or None for weights of 1.

    Returns:
        The gates by site index.

    Raises:
        FactorMixError: `load_adapters`, `check_domains` or `fill_own_gates` refuses; the gates have other sites or
            shapes; or a file is damaged.
    """
    if gate is None:
        load_adapters(model, folders)
        return {}
    sites = sites_of(model)
    if str(gate) == OWN:
        load_adapters(model, folders)
        gates = put_gates(model, sites, list(folders), "sigmoid", "on")
        fill_own_gates(gates, folders)
    else:
        config = read_gate_config(gate)
        check_domains(config, folders, gate)
        load_adapters(model, folders)
        gates = put_gates(model, sites, list(folders), config["kind"], config["start"])
        fill_gates(gates, gate)
    for site_gate in gates.values():
        site_gate.requires_grad_(False).eval()
    return gates


def put_gates(
    model: nn.Module, sites: Sequence[FFNSite], domains: Sequence[str], kind: str, start: str
) -> dict[int, DomainGate]:
    """Put a fresh gate at every site that has an adapter. It weighs the domains that have an adapter there.

    Args:
        model: the model with adapters, changed in place.
        sites: its FFNs, found before adapters were put beside them.
        domains: names of the domains in the order of the weights.
        kind, start: see `DomainGate`.

    Returns:
        The gates by site index.
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
    """Load saved gates into `gates`.

    Raises:
        FactorMixError: the file has gates of other sites or shapes, or it is damaged.
    """
    file = Path(folder) / GATE_WEIGHTS
    tensors, wanted = read_tensors(file), gate_tensors(gates)
    check_tensors(wanted, tensors, f"gate {str(file)!r}")
    for name, tensor in wanted.items():
        tensor.copy_(tensors[name])


@torch.no_grad()
def fill_own_gates(gates: Mapping[int, DomainGate], folders: Mapping[str, str | Path]) -> None:
    """Load each adapter's own gate into `gates`, one row each, because a domain's weight depends on no other domain.

    Args:
        gates: gates of the sigmoid kind, by site index.
        folders: adapter directories by name.

    Raises:
        FactorMixError: `own_rows` refuses, or an adapter's gate has other sites.
    """
    for name, folder in folders.items():
        tensors = own_rows(folder)
        weighed = {i: gate for i, gate in gates.items() if name in gate.domains}
        rows = {i: cast(Tensor, gate.weight)[gate.domains.index(name)] for i, gate in weighed.items()}  # (H,) each
        wanted = {f"{i}.weight": row[None] for i, row in rows.items()}
        check_tensors(wanted, tensors, f"gate {str(Path(folder) / GATE / GATE_WEIGHTS)!r}")
        for i, row in rows.items():
            row.copy_(tensors[f"{i}.weight"][0])  # (H,)


def own_rows(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of an adapter's own gate: "<site>.weight" (1, H).

    Raises:
        FactorMixError: the adapter has no gate, or the gate was fitted for other weights.
    """
    own = Path(folder) / GATE
    if not own.is_dir():
        raise FactorMixError(
            f"{str(folder)!r} has no gate of its own, because it was injected with --gate-tokens 0. Inject again, or "
            "leave 'own' out."
        )
    (fitted,), (found,) = read_gate_config(own)["domains"], domain_hashes({"": folder})
    if fitted["sha256"] != found["sha256"]:
        raise FactorMixError(
            f"the gate in {str(own)!r} was fitted for weights with SHA-256 {fitted['sha256']}, but the weights beside "
            f"it have {found['sha256']}. Copy the directory whole, or inject again."
        )
    return read_tensors(own / GATE_WEIGHTS)
