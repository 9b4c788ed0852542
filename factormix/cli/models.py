"""From what the user typed to a model, a tokenizer or a text file: one place for all commands.

MODEL is a directory (dense or FactorMix), ``asset:NAME``, a .gguf file or a hub name. Whatever cannot be opened whole
is a FactorMixError: a model never starts with weights that were not in the file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from factormix import checkpoint
from factormix.assets.fetch import fetch_named
from factormix.assets.table import ASSETS
from factormix.data.text import read_documents
from factormix.ffn.cost import empty_model
from factormix.nn import check_quantize
from factormix.nn import quantize as quantize_ffns
from factormix.run.directory import sha256
from factormix.run.errors import FactorMixError, choose, nearest
from factormix.run.progress import say

DTYPES: dict[str, torch.dtype | str] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """Where a model lies.

    Attributes:
        typed: what the user typed, for messages.
        path: a directory, or a hub name.
        gguf: name of the .gguf file in that directory.
        hub: True when `path` is a hub name.
    """

    typed: str
    path: str
    gguf: str | None = None
    hub: bool = False

    @property
    def where(self) -> dict[str, Any]:
        """Keyword arguments that every from_pretrained needs beside the path."""
        return ({"gguf_file": self.gguf} if self.gguf else {}) | ({} if self.hub else {"local_files_only": True})


def locate(name: str, quiet: bool = False) -> Source:
    """Find what MODEL names; an asset is fetched.

    Raises:
        FactorMixError: nothing of that name, or no model.
    """
    if name.startswith("asset:"):
        folder = fetch_named(name, quiet)
        if not (folder / "config.json").is_file():
            models = ", ".join(f"asset:{asset.name}" for asset in ASSETS.values() if asset.kind == "model")
            raise FactorMixError(f"{name!r} is text, not a model; models: {models}.")
        return Source(name, str(folder))
    path = Path(name)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise FactorMixError(f"model file {name!r} does not exist.{nearest(name, _beside(path, '*.gguf'))}")
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise FactorMixError(f"model file {name!r} does not begin with GGUF: it is another format, or damaged.")
        return Source(name, str(path.parent), path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FactorMixError(f"{name!r} has no config.json, so it is no model directory.")
        return Source(name, name)
    if path.exists():
        raise FactorMixError(f"model {name!r} is a file; name a model directory or a .gguf file.")
    if not _HUB_NAME.fullmatch(name):
        raise FactorMixError(f"model directory {name!r} does not exist.{nearest(name, _beside(path, '*'))}")
    return Source(name, name, hub=True)


def read_config(source: Source) -> PretrainedConfig:
    """The config of a model: of a dense one its own, of a FactorMix one a FactorMixConfig.

    Raises:
        FactorMixError: absent, unreadable, of a kind that transformers does not know; altered (FactorMix).
    """
    if not source.hub and (Path(source.path) / checkpoint.HASHES).is_file():
        checkpoint.verify(Path(source.path))
    if not source.hub and checkpoint.is_factormix(source.path):
        return checkpoint.read_config(Path(source.path))
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source.path, **source.where)
    except Exception as error:  # whatever a damaged or foreign file makes transformers raise
        raise FactorMixError(_cannot("read the config of", source, error)) from error
    if source.gguf and not config.architectures:
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "")]
    return config


def empty(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a config without weights, to plan on; a factored one in its own class."""
    if isinstance(config, checkpoint.FactorMixConfig):
        return checkpoint.empty(config)
    return empty_model(config)


def check_compute(dtype: str, name: str) -> torch.device:
    """The device called `name`; refuses one that is not here, and a dtype that cannot be."""
    choose("dtype", dtype, DTYPES)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}
        there = [kind for kind, here in has.items() if here]
        raise FactorMixError(f"device {name!r} is not to be had here; allowed: {', '.join(there)}.") from error
    return device


def open_model(
    source: Source,
    dtype: str = "float32",
    device: str = "cpu",
    device_map: str | None = None,
    quantize: str | None = None,
) -> PreTrainedModel:
    """The model, with the head its config names, in eval mode; `quantize` "int8": see `factormix.quantize`.

    Raises:
        FactorMixError: no model there, a file truncated or altered (named), weights missing, no such device or dtype;
            an FFN that cannot be quantised.
    """
    target = check_compute(dtype, device)
    check_quantize(quantize)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = read_config(source)
    if isinstance(config, checkpoint.FactorMixConfig):
        model = checkpoint.load(source.path, dtype=DTYPES[dtype], device_map=device_map)
    else:
        model = _open_dense(source, config, DTYPES[dtype], device_map)
    if quantize is not None:
        model = quantize_ffns(model)
    return model.eval() if device_map else model.to(target).eval()  # type: ignore[arg-type]


def say_slow(model: PreTrainedModel, quiet: bool) -> None:
    """A remark where the checkpoint's own dtype is a slow one here: torch multiplies bfloat16 at an eighth of float32's
    speed on x86 processors without AVX-512."""
    without = torch.cpu._is_avx2_supported() and not torch.cpu._is_avx512_supported()
    if without and model.device.type == "cpu" and model.dtype == torch.bfloat16:
        say("note: this processor has no AVX-512, and torch is slow in bfloat16 on it; try --dtype float32.", quiet)


def by_name(option: str, folders: Sequence[str]) -> dict[str, Path]:
    """Adapter directories by the names of their folders, which name the domains; what no domain's name may hold, such
    as a dot, becomes "_".

    Raises:
        FactorMixError: two have one name.
    """
    named = {re.sub(r"[^A-Za-z0-9_-]", "_", Path(folder).resolve().name): Path(folder) for folder in folders}
    if len(named) < len(folders):
        raise FactorMixError(f"two of {option} {', '.join(folders)} have the same name; rename one directory.")
    return named


def open_adapted(
    source: Source,
    adapters: Sequence[str],
    gate: Path | None = None,
    mix: Path | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    device_map: str | None = None,
    quantize: str | None = None,
) -> PreTrainedModel:
    """`open_model` with domain adapters beside its FFNs, all of them active, and gates over them; or with all of a
    stage-2 directory.

    Raises:
        FactorMixError: as `open_model`; no MixDA adapter there, two of one name, or one made for another model;
            gates over other adapters; either beside a stage-2 directory, which names its own; a prefix, which is no
            part of the model.
    """
    if mix is not None:
        if adapters or gate is not None:
            given = f"--adapter {list(adapters)}" if adapters else f"--gate {str(gate)!r}"
            raise FactorMixError(f"{given} beside --mix: {str(mix)!r} names its own adapters and gates. Give one.")
        return _open_mixed(source, mix, dtype, device, device_map, quantize)
    if gate is not None and not adapters:
        raise FactorMixError(f"--gate {str(gate)!r} needs the adapters it weighs: give --adapter DIR, in its order.")
    folders = by_name("--adapter", adapters)
    model = open_model(source, dtype, device, device_map, quantize)
    if adapters:
        from factormix.mix.gated import open_adapters  # imports PEFT, which most commands do without

        open_adapters(model, folders, gate)
    return model.eval()


def _open_mixed(
    source: Source, mix: Path, dtype: str, device: str, device_map: str | None, quantize: str | None
) -> PreTrainedModel:
    from factormix.mix.load import load_mix, read_task  # imports PEFT

    values = read_task(mix)
    if values["task_adapter"]["kind"] == "prefix":
        raise FactorMixError(f"{str(mix)!r} has a prefix, which only `factormix predict` puts before the text.")
    check_base(source, mix, values["base"])
    loaded, _ = load_mix(mix, open_model(source, dtype, device, device_map, quantize))
    return loaded.model.eval()


def check_base(source: Source, mix: Path, base: Mapping[str, Any]) -> None:
    """Refuse another base than the one a stage-2 directory was made from, as task.json knows it.

    Raises:
        FactorMixError: names both hashes.
    """
    known, found = base.get("identity"), identity(source, read_config(source))
    if known is not None and known != found:
        raise FactorMixError(
            f"{source.typed!r} is not the base that {str(mix)!r} was made from: its files have the hash {found}, "
            f"{known} is recorded. Name the base it was made from."
        )


def open_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Raises:
        FactorMixError: there is none, or it does not load.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.path, **source.where)
        if len(tokenizer) > len(tokenizer.all_special_ids):
            return tokenizer
    except Exception as error:  # transformers raises anything for a damaged tokenizer.json
        raise FactorMixError(_cannot("read a tokenizer of", source, error)) from error
    raise FactorMixError(
        f"the tokenizer of {source.typed!r} is empty: the directory lacks its tokenizer files. Copy them."
    )


def locate_text(names: Sequence[str], quiet: bool = False) -> list[Path]:
    """The text files that --text names; assets are fetched."""
    paths = []
    for name in names:
        path = fetch_named(name, quiet)
        if path.is_dir() and name.startswith("asset:"):
            files = ", ".join(f"asset:{file.stem}" for file in sorted([*path.glob("*.txt"), *path.glob("*.jsonl")]))
            raise FactorMixError(f"{name!r} is not one text; name one: {files or 'asset:brown-train'}.")
        paths.append(path)
    return paths


def text_hashes(paths: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of each text by its file's name, by its whole path where two have the same name."""
    files = {path.resolve() for path in paths}
    shared = {name for name, count in Counter(file.name for file in files).items() if count > 1}
    return {str(f) if f.name in shared else f.name: read_documents(f).sha256 for f in sorted(files)}


def run_json(source: Source) -> dict[str, Any]:
    """What made a model: the run.json in its directory; empty where there is none.

    Raises:
        FactorMixError: a damaged one.
    """
    file = Path(source.path) / "run.json"
    if source.hub or not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise FactorMixError(f"{str(file)!r} does not read: {error}. Remove it, or make the model anew.") from error


def identity(source: Source, config: PretrainedConfig) -> str:
    """SHA-256 over a model's files, for a resumed run to know its model by; of a hub model, name and commit."""
    if source.hub:
        return f"{source.path}@{getattr(config, '_commit_hash', None)}"
    folder = Path(source.path)
    names = [folder / source.gguf] if source.gguf else [folder / "config.json", *_weight_files(folder)]
    return hashlib.sha256("\n".join(f"{f.name} {sha256(f)}" for f in names).encode()).hexdigest()


def _open_dense(source: Source, config: PretrainedConfig, dtype: Any, device_map: str | None) -> PreTrainedModel:
    if not source.hub and source.gguf is None:
        _refuse_truncated(Path(source.path))
    if source.gguf:
        _need_gguf(source)
    try:
        found, info = _model_class(source, config).from_pretrained(
            source.path, dtype=dtype, device_map=device_map, output_loading_info=True, **source.where
        )
    except Exception as error:  # whatever a damaged or foreign file makes transformers raise
        raise FactorMixError(_cannot("load", source, error)) from error
    missing = sorted(name for name in info.get("missing_keys") or () if "pooler" not in name)
    if missing:
        raise FactorMixError(
            f"{source.typed!r} lacks {len(missing)} weights of a {type(found).__name__}, first {missing[0]!r}: the "
            "files are incomplete, or config.json names another architecture than theirs."
        )
    if source.gguf:  # dequantised by now, which transformers does not note: it would refuse to save
        if hasattr(found.config, "quantization_config"):
            del found.config.quantization_config
        found.is_quantized, found.hf_quantizer = False, None
    return found  # type: ignore[no-any-return]


def _model_class(source: Source, config: PretrainedConfig) -> Any:
    """The class that config.json names (causal, masked, sequence-to-sequence ...), else the base model's."""
    if source.gguf:
        return AutoModelForCausalLM
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    return AutoModel


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    return files or sorted([*folder.glob("pytorch_model*.bin"), *folder.glob("*.pt")])


def _refuse_truncated(folder: Path) -> None:
    """Name the damaged file: transformers' own message does not."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except Exception as error:  # safetensors' own class, or OSError
            raise FactorMixError(
                f"{str(file)!r} is truncated or no safetensors file ({error}). Copy or download it again."
            ) from error


def _need_gguf(source: Source) -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise FactorMixError(
            f"reading {source.typed!r} needs the package gguf: pip install 'factormix[export]'."
        ) from error


def _beside(path: Path, pattern: str) -> list[str]:
    return [str(p) for p in path.parent.glob(pattern)] if path.parent.is_dir() else []


def _cannot(what: str, source: Source, error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    reason = f"{type(error).__name__}: {lines[0]}"
    if source.hub:
        return (
            f"cannot {what} {source.typed!r}: it is no directory here, and the hub did not give it ({reason}). Check "
            "the name and the connection, or give a directory, asset:NAME or a .gguf file."
        )
    return f"cannot {what} {str(Path(source.path, source.gguf or ''))!r} ({reason}). Copy or download it again."
