"""Write a factored model as a directory that stock engines load. This file is the pipeline, from top to bottom.

    export_model(model, "smol-moe", packed, tokenizer, to="auto")

1. `needs.py` reads what the model needs of a container. `choose.py` picks one or says why none fits.
2. `router_scale.py` measures on text how to scale the routers. `tensors.py` makes the container's state dict.
3. `write.py` writes it into a temporary directory. `parity.py` loads that with plain transformers and compares it with
   the model on text. If they differ too much nothing is kept, unless approximations were allowed.
4. `card.py` writes the numbers into README.md. `factormix.json` lets `factormix.load` read the model back.
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
from factormix.export.load import write_origin
from factormix.export.needs import Needs, read_needs
from factormix.export.parity import LEAST_TOKENS, Parity, compare
from factormix.export.router_scale import RouterScale, measure_router_scale
from factormix.export.tensors import container_state
from factormix.export.write import write_container
from factormix.run.directory import output_directory
from factormix.run.errors import FactorMixError, choose
from factormix.run.record import RunRecord

GGUF = "gguf"


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        choice: the container, and why it was chosen.
        router_scale: how the routers were scaled.
        parity: how far the exported model is from the factored one.
        dtype: dtype of the weights, "float32" or "bfloat16".
        parameters: number of parameters of the factored model.
        parameters_per_token: parameters of the factored model used for one token.
        gguf: names of the .gguf files; empty for a container's directory.
    """

    choice: Choice
    router_scale: RouterScale
    parity: Parity
    dtype: str
    parameters: int
    parameters_per_token: int
    gguf: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as --json, run.json and the card contain them."""
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
            "m": self.router_scale.m,
            "exponents": list(self.router_scale.exponents),
            "flips_by_m": self.router_scale.flips,
            "deviation_by_m": self.router_scale.deviations,
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
        model: a factored causal model in float32 or bfloat16. The files have its dtype, but routers are float32.
        out: the directory to write.
        packed: real text of at least `LEAST_TOKENS` tokens, used to scale the routers and to measure parity.
        tokenizer: the model's tokenizer, written beside it. A .gguf file needs one.
        to: a container's name, "auto", or "gguf" for .gguf files instead of a container's directory.
        quantizations: "f16" or "q8_0", one for each .gguf file.
        approximate: allow changes if no container holds the model exactly, and write it even if parity fails. The
            distance is reported.
        overwrite: replace an existing directory when the new one is complete.
        origin: where the model comes from, for the card.
        record: the caller's record of the run. Its tokens and metrics are filled in, and it is written as run.json.
        quiet: show no progress line.

    Returns:
        What was written, and its distance from the factored model.

    Raises:
        FactorMixError: no container holds the model, with the reason and the remedies; the text is too short; the
            dtype is float16; or the exported model is outside the limits of parity.
    """
    needs = read_needs(model)
    choice = choose_container(needs, to, approximate) if to != GGUF else _choose_gguf(needs, quantizations, approximate)
    if to == GGUF and tokenizer is None:
        raise FactorMixError("no tokenizer received; a .gguf file holds its tokenizer, so give one.")
    if packed.tokens < LEAST_TOKENS:
        raise FactorMixError(
            f"{packed.tokens:,} tokens of text are too few to compare the models on; give at least {LEAST_TOKENS:,}."
        )
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
    with record.phase("router scale"):
        scale = measure_router_scale(reference, packed, scoring, quiet)
    with output_directory(out, overwrite) as folder:
        with record.phase("write"):
            inner = folder / GGUF if to == GGUF else folder  # this container is removed when its .gguf is written
            inner.mkdir(exist_ok=True)
            state = container_state(model, choice.container, choice.needs, scale)
            write_container(inner, choice.container, choice.needs, state, model, tokenizer)
            if to != GGUF:
                write_origin(folder, model, choice, scale)
        with record.phase("parity"):
            parity = compare(reference, inner, choice.container, choice.needs, packed, quiet)
        failures = [] if choice.approximations else parity.failures(choice.container)
        if failures and not approximate:
            raise FactorMixError(_outside(choice, failures))
        choice = replace(choice, approximations=(*choice.approximations, *failures))
        files = () if to != GGUF else _write_ggufs(folder, choice, state, tokenizer, quantizations, origin.name)
        dtype = str(model.dtype).removeprefix("torch.")
        exported = Exported(choice, scale, parity, dtype, model.num_parameters(), parameters_per_token(model), files)
        record.tokens, record.metrics = packed.tokens, exported.to_dict()
        (folder / "README.md").write_text(card(origin, exported.to_dict()), encoding="utf-8")
        record.write(folder / "run.json")
    return exported


def _choose_gguf(needs: Needs, quantizations: Sequence[str], approximate: bool) -> Choice:
    gguf_file = _gguf_file()
    for quantization in quantizations:
        choose("quantization", quantization, gguf_file.FORMATS)
    return gguf_file.choose_gguf(needs, approximate)  # type: ignore[no-any-return]


def _write_ggufs(
    folder: Path, choice: Choice, state: Mapping[str, Tensor], tokenizer: Any, quantizations: Sequence[str], name: str
) -> tuple[str, ...]:
    """Write the files, remove the container that they were made from, and return their names."""
    config = choice.container.config(choice.needs)
    plain = name.rpartition("/")[2]
    files = tuple(f"{plain}-{quantization}.gguf" for quantization in quantizations)
    for file, quantization in zip(files, quantizations):
        _gguf_file().write_gguf(folder / file, choice.container, config, state, tokenizer, quantization, plain)
    shutil.rmtree(folder / GGUF)
    return files


def _gguf_file() -> Any:
    try:
        return importlib.import_module("factormix.export.gguf_file")
    except ImportError as error:
        raise FactorMixError(
            "writing .gguf files needs the package gguf, which is not installed. Run pip install 'factormix[export]'."
        ) from error


def _outside(choice: Choice, failures: Sequence[str]) -> str:
    return (
        f"nothing was written, because the model exported as {choice.container.name} differs too much from the "
        f"factored one: {'; '.join(failures)}. Try another container with --to, or --dtype float32, or write it anyway "
        "with --approximate."
    )
