"""Export: a factored model becomes a directory that stock engines load. The pipeline, from top to bottom.

    export_model(model, "smol-moe", packed, tokenizer, to="auto")

1. `needs.py` reads what the model asks of a container, `choose.py` picks one or says why none will do.
2. `gates.py` measures on text how the routers are to be scaled; `tensors.py` makes the container's state dict.
3. `write.py` writes it, beside its place. `parity.py` loads it with plain transformers and compares it with the
   model on text. Outside its limits nothing is written, unless approximations were asked for.
4. `card.py` writes the numbers into README.md; `factormix.json` lets `factormix.load` take the model back.
"""

from __future__ import annotations

import copy
import importlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factormix.data.packing import Packed
from factormix.evaluate.cost import parameters_per_token
from factormix.export.card import Origin, card
from factormix.export.choose import Choice, choose_container
from factormix.export.gates import Gates, measure_gates
from factormix.export.load import write_origin
from factormix.export.needs import Needs, read_needs
from factormix.export.parity import LEAST_TOKENS, Parity, compare
from factormix.export.tensors import container_state
from factormix.export.write import write_container
from factormix.run.directory import output_directory
from factormix.run.errors import FactorMixError, choose
from factormix.run.record import RunRecord

GGUF = "gguf"


@dataclass(frozen=True)
class Exported:
    """What was written, and how near it is."""

    choice: Choice
    gates: Gates
    parity: Parity
    dtype: str
    parameters: int
    parameters_per_token: int
    gguf: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in --json, run.json and the card."""
        needs, container = self.choice.needs, self.choice.container
        return {
            "container": container.name,
            "architecture": container.model_class.__name__,
            "reason": self.choice.reason,
            "approximations": list(self.choice.approximations),
            "layout": str(needs.layout),
            "routed": needs.routed,
            "active": needs.active,
            "width": needs.container_width,
            "shared": needs.container_shared,
            "dtype": self.dtype,
            "parameters": self.parameters,
            "parameters_per_token": self.parameters_per_token,
            "m": self.gates.m,
            "exponents": list(self.gates.exponents),
            "flips_by_m": self.gates.flips,
            "deviation_by_m": self.gates.deviations,
            "parity": self.parity.to_dict(),
            "gguf": list(self.gguf),
        }


def export_model(
    model: PreTrainedModel,
    out: str | Path,
    packed: Packed,
    tokenizer: PreTrainedTokenizerBase | None = None,
    to: str = "auto",
    quantizations: Sequence[str] = ("f16",),
    approximate: bool = False,
    overwrite: bool = False,
    origin: Origin | None = None,
    record: RunRecord | None = None,
    quiet: bool = False,
) -> Exported:
    """Write `model` as a stock architecture.

    Args:
        model: a factored causal model; its dtype is that of the files (float32 or bfloat16; routers always float32).
        out: the directory to write.
        packed: real text, at least `LEAST_TOKENS` tokens: m is chosen and parity measured on it.
        tokenizer: written beside the model.
        to: a container's name, "auto", or "gguf": .gguf files instead of a container's directory.
        quantizations: of the .gguf files, one each: "f16", "q8_0".
        approximate: where no container holds the model exactly, change it, and write what is outside parity's limits
            too; the distance is reported.
        overwrite: replace an existing directory, once the new one is whole.
        origin: for the card.
        record: run.json, if the caller keeps one; its metrics are filled in.
        quiet: no progress.

    Raises:
        FactorMixError: no container holds the model (with the reason and what would work), too little text, float16,
            or an exported model outside the limits of parity.
    """
    needs = read_needs(model)
    choice = choose_container(needs, to, approximate) if to != GGUF else _choose_gguf(needs, quantizations, approximate)
    if to == GGUF and tokenizer is None:
        raise FactorMixError("a .gguf file holds its tokenizer; give one.")
    if packed.tokens < LEAST_TOKENS:
        raise FactorMixError(f"{packed.tokens:,} tokens of text are too few to compare on; give {LEAST_TOKENS:,}.")
    if model.dtype not in (torch.float32, torch.bfloat16):
        raise FactorMixError(
            f"dtype {str(model.dtype).removeprefix('torch.')} cannot hold the routers' small weights; allowed: "
            "float32, bfloat16."
        )
    record = record or RunRecord("export")
    origin = origin or Origin(Path(out).name)
    reference = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
    scoring = choice.container.scoring(choice.needs)
    if to == GGUF:
        scoring = _gguf_file().llama_cpp_scoring(scoring)
    with record.phase("gates"):
        gates = measure_gates(reference, packed, scoring, quiet)
    with output_directory(out, overwrite) as folder:
        with record.phase("write"):
            inner = folder / GGUF if to == GGUF else folder  # the container goes again once its .gguf is written
            inner.mkdir(exist_ok=True)
            state = container_state(model, choice.container, choice.needs, gates)
            write_container(inner, choice.container, choice.needs, state, model, tokenizer)
            if to != GGUF:
                write_origin(folder, model, choice, gates)
        with record.phase("parity"):
            parity = compare(reference, inner, choice.container, choice.needs, packed, quiet)
        failures = [] if choice.approximations else parity.failures(choice.container)
        if failures and not approximate:
            raise FactorMixError(_outside(choice, failures))
        choice = replace(choice, approximations=(*choice.approximations, *failures))
        files = () if to != GGUF else _write_ggufs(folder, choice, state, tokenizer, quantizations, origin.name)
        dtype = str(model.dtype).removeprefix("torch.")
        exported = Exported(choice, gates, parity, dtype, model.num_parameters(), parameters_per_token(model), files)
        record.tokens, record.metrics = packed.tokens, exported.to_dict()
        (folder / "README.md").write_text(card(origin, exported.to_dict()), encoding="utf-8")
        record.write(folder / "run.json")
    return exported


def _choose_gguf(needs: Needs, quantizations: Sequence[str], approximate: bool) -> Choice:
    gguf_file = _gguf_file()
    for each in quantizations:
        choose("quantization", each, gguf_file.FORMATS)
    return gguf_file.choose_gguf(needs, approximate)  # type: ignore[no-any-return]


def _write_ggufs(
    folder: Path, choice: Choice, state: Mapping[str, Tensor], tokenizer: Any, quantizations: Sequence[str], name: str
) -> tuple[str, ...]:
    """The files' names; the container they were made of is removed."""
    config = choice.container.config(choice.needs)
    plain = name.rpartition("/")[2]
    files = tuple(f"{plain}-{each}.gguf" for each in quantizations)
    for file, each in zip(files, quantizations):
        _gguf_file().write_gguf(folder / file, choice.container, config, state, tokenizer, each, plain)
    shutil.rmtree(folder / GGUF)
    return files


def _gguf_file() -> Any:
    try:
        return importlib.import_module("factormix.export.gguf_file")
    except ImportError as error:
        raise FactorMixError("writing .gguf files needs the package gguf: pip install 'factormix[export]'.") from error


def _outside(choice: Choice, failures: Sequence[str]) -> str:
    return (
        f"nothing was written: exported as {choice.container.name}, the model is not near enough to FactorMix's: "
        f"{'; '.join(failures)}. Try another container with --to, --dtype float32, or write it all the same with "
        "--approximate."
    )
