"""Saved adapters into a model, and gates over them: those of stage 2, or each adapter's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from factormix.ffn import FFNSite
from factormix.mix.adapter_files import load_adapters
from factormix.mix.gate_files import (
    GATE,
    GATE_WEIGHTS,
    check_domains,
    domain_hashes,
    gate_tensors,
    read_gate_config,
)
from factormix.mix.peft_tuner import domain_layer
from factormix.mix.task_adapters import check_tensors
from factormix.nn import DomainGate, sites_of
from factormix.run.errors import FactorMixError
from factormix.run.tensors import read_tensors

OWN = "own"  # in a gate's place: each adapter's own, side by side


def open_adapters(
    model: PreTrainedModel, folders: Mapping[str, str | Path], gate: str | Path | None = None
) -> dict[int, DomainGate]:
    """Put saved adapters into a model and, over them, saved gates; all active and frozen.

    Args:
        model: the base, changed in place.
        folders: adapter directories by name, in the order of the gates' weights.
        gate: a folder of gates, "own" for each adapter's own, or None for weights of 1.

    Returns:
        The gates by site index.

    Raises:
        FactorMixError: as `load_adapters`, `check_domains` and `fill_own_gates`; gates of other sites or shapes, or a
            damaged file.
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


@torch.no_grad()
def fill_own_gates(gates: Mapping[int, DomainGate], folders: Mapping[str, str | Path]) -> None:
    """Take each adapter's own gate, row by row: a domain's weight depends on no other domain.

    Args:
        gates: of the sigmoid kind.
        folders: adapter directories by name.

    Raises:
        FactorMixError: as `own_rows`; a gate of other sites.
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
    """An adapter's own gate: "<site>.weight" (1, H).

    Raises:
        FactorMixError: the adapter has none, or one that was fitted for other weights.
    """
    own = Path(folder) / GATE
    if not own.is_dir():
        raise FactorMixError(
            f"{str(folder)!r} has no gate of its own: it was injected with --gate-tokens 0. Inject again, or leave "
            "'own' out."
        )
    (fitted,), (found,) = read_gate_config(own)["domains"], domain_hashes({"": folder})
    if fitted["sha256"] != found["sha256"]:
        raise FactorMixError(
            f"the gate in {str(own)!r} was fitted for weights with SHA-256 {fitted['sha256']}; those beside it have "
            f"{found['sha256']}. Copy the directory whole, or inject again."
        )
    return read_tensors(own / GATE_WEIGHTS)
