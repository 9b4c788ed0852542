"""Read and write adapter directories in PEFT's form: adapter_config.json and adapter_model.safetensors at the top."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from factormix.ffn import FFNSite
from factormix.mix.base_identity import check_base, identity_of
from factormix.mix.gate_files import GATE, save_gates
from factormix.mix.masked_head import MaskedHead, save_head
from factormix.mix.peft_tuner import MixDAConfig, MixDALayer, assert_trainable
from factormix.nn import DomainGate
from factormix.run.directory import output_directory, write_json
from factormix.run.errors import FactorMixError
from factormix.run.tensors import read_tensors, write_tensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def check_domain(name: str) -> None:
    """Check that a domain's name is valid for PEFT and for file systems.

    Raises:
        FactorMixError: it is not; the message gives the rule.
    """
    plain = name.replace("-", "").replace("_", "")
    if not (plain.isascii() and plain.isalnum()) or name in "mixda_":
        raise FactorMixError(
            f"domain {name!r} is not allowed; allowed: letters, digits, '-' and '_'. The name must not be a part of "
            "'mixda_', because PEFT finds adapters by that word."
        )


def save_adapter(
    model: PeftModel,
    domain: str,
    path: str | Path,
    base: str | None = None,
    overwrite: bool = False,
    run: Mapping[str, Any] | None = None,
    head: MaskedHead | None = None,
    gates: Mapping[int, DomainGate] | None = None,
) -> None:
    """Write one adapter as PEFT's directory. If writing fails, nothing is left of it.

    Args:
        model: the model with the adapter.
        domain: the adapter's name.
        path: the directory to write.
        base: the name under which a reader finds the base model. It is recorded, but not checked.
        overwrite: replace an existing directory.
        run: the record of the run, written as run.json.
        head: the masked-LM head the adapter was trained under, if the base has none. It is written beside the adapter.
        gates: the adapter's own gates by site index, from `fit_own_gate`. They are written into `gate/`.

    Raises:
        FactorMixError: the directory exists and `overwrite` is False, or the disk is full.
    """
    tensors = adapter_tensors(model, domain)
    with output_directory(path, overwrite) as folder:
        model.peft_config[domain].save_pretrained(str(folder))
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        values |= {"base_model_name_or_path": base, "inference_mode": True, "base_ffns": _base_ffns(model, domain)}
        write_json(folder / CONFIG, values)
        write_tensors(folder / WEIGHTS, tensors)
        if head is not None:
            save_head(head, folder)
        if gates:
            (folder / GATE).mkdir()
            save_gates(gates, {domain: folder}, folder / GATE)
        if run is not None:
            write_json(folder / "run.json", run)


def adapter_tensors(model: PeftModel, domain: str) -> dict[str, Tensor]:
    """An adapter's tensors by the names in its file, which do not contain the adapter's own name.

    This is PEFT's rule. Its own function is not used, because that of PEFT 0.18 returns the tensors of all adapters.
    """
    mark = f".mixda_adapters.{domain}."
    return {n.replace(mark, ".mixda_adapters."): tensor for n, tensor in model.state_dict().items() if mark in n}


def _base_ffns(model: nn.Module, domain: str) -> str | None:
    """The identity of the FFNs that have an adapter of this domain."""
    layers = [m for m in model.modules() if isinstance(m, MixDALayer) and domain in m.mixda_adapters]
    return identity_of([layer.base_layer for layer in layers])


def load_adapters(model: PreTrainedModel, folders: Mapping[str, str | Path]) -> PeftModel:
    """Load saved adapters into a model. All of them are active and frozen.

    Args:
        model: the base they were made from, changed in place.
        folders: adapter directories by name.

    Returns:
        The model in PEFT's wrapper.

    Raises:
        FactorMixError: a directory holds no MixDA adapter or is damaged, or an adapter was made for another model or
            on another base of the same shapes.
    """
    adapted: PeftModel | None = None
    for name, folder in folders.items():
        check_domain(name)
        recorded = read_adapter_config(folder).base_ffns
        saved = set(read_tensors(Path(folder) / WEIGHTS))
        try:
            if adapted is None:
                adapted = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
            else:
                adapted.load_adapter(str(folder), name)
        except (OSError, RuntimeError, ValueError) as error:
            if isinstance(error, FactorMixError):
                raise
            raise FactorMixError(f"adapter {str(folder)!r} cannot be loaded: {error}") from error
        wanted = set(adapter_tensors(adapted, name))
        if saved != wanted:  # PEFT only warns, and leaves a fresh adapter in the model
            raise FactorMixError(
                f"{str(Path(folder) / WEIGHTS)!r} does not hold this adapter's tensors: missing "
                f"{sorted(wanted - saved)[:3]}, unexpected {sorted(saved - wanted)[:3]}. Copy or make it again."
            )
        check_base(recorded, _base_ffns(adapted, name), folder)
    if adapted is None:
        raise FactorMixError("no adapter received; give at least one adapter directory.")
    cast(Any, adapted.base_model).set_adapter(list(folders))
    assert_trainable(adapted, set(), "after load")
    return adapted


def check_shapes(config: MixDAConfig, sites: Sequence[FFNSite], folder: str | Path) -> list[FFNSite]:
    """The sites of a model that an adapter belongs to. Only their shapes and names are compared.

    Args:
        config: the adapter's config.
        sites: all sites of the model.
        folder: the adapter's directory, for the message.

    Raises:
        FactorMixError: the adapter was made for another model, or it names no FFN.
    """
    found = []
    for key, shapes in (config.sites or {}).items():
        site = next((site for site in sites if site.index == int(key)), None)
        if site is None or site.hidden != shapes["hidden"] or site.name not in (config.target_modules or ()):
            here = "no such FFN" if site is None else f"hidden size {site.hidden} at {site.name}"
            raise FactorMixError(f"adapter {str(folder)!r} was made for another model: its site {key} is {here} here.")
        found.append(site)
    if not found:
        raise FactorMixError(f"adapter {str(folder)!r} names no FFN, so the directory is damaged. Make it again.")
    return sorted(found, key=lambda site: site.index)


def read_adapter_config(folder: str | Path) -> MixDAConfig:
    """Read the config of a MixDA adapter directory.

    Raises:
        FactorMixError: a file is missing or unreadable, or the adapter is of another PEFT method.
    """
    for name in (CONFIG, WEIGHTS):
        if not (Path(folder) / name).is_file():
            raise FactorMixError(f"{str(folder)!r} has no {name}, so it is no adapter directory.")
    try:
        values = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
        kind = values["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise FactorMixError(f"{str(Path(folder) / CONFIG)!r} is damaged ({error}). Copy or make it again.") from error
    if kind != "MIXDA":
        raise FactorMixError(f"{str(folder)!r} holds a {kind!r} adapter; allowed: MixDA adapters, made by `inject`.")
    return cast(MixDAConfig, MixDAConfig.from_pretrained(str(folder)))
