"""Save and load a FactorMix directory.

What lies in it: ``config.json`` (model_type ``factormix``, the dense config whole under ``base_config``, the sparse
sites), ``model.factormix*.safetensors``, the tokenizer and ``run.json`` where they were given, and ``hashes.json``
(SHA-256 of every other file). The weights are transformers' variant "factormix": a stock class named outright, which
would make new FFNs for those it does not find, finds no weights at all.
A directory is written beside its place and renamed into it; it loads with every tensor accounted for, or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto

from factormix.nn import FactorMixMixin, base_class, factormix_class, refuse_quantised
from factormix.run.directory import check_hashes, output_directory, sha256, write_json
from factormix.run.errors import FactorMixError

FORMAT_VERSION = 1
HASHES = "hashes.json"
VARIANT = "factormix"


class FactorMixConfig(PretrainedConfig):
    """config.json of a FactorMix directory, as transformers' Auto classes read it.

    Attributes:
        base_config: the dense model's config, whole.
        architecture: the dense model's class, e.g. "LlamaForCausalLM".
        factormix: {"sites": {index: SparseSpec}, "made_by": {...}}.
        format_version: of this layout of the directory.
    """

    model_type = "factormix"

    def __init__(
        self,
        base_config: dict[str, Any] | None = None,
        architecture: str = "",
        factormix: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ) -> None:
        self.base_config = base_config or {}
        self.architecture = architecture
        self.factormix = factormix or {}
        self.format_version = format_version
        super().__init__(**kwargs)


def save(
    model: PreTrainedModel,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    run: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> None:
    """Write a FactorMix directory in one step: it is whole, or `path` is as it was.

    Args:
        model: a FactorMix model.
        path: the directory. One that exists and is not empty is refused unless `overwrite`, or unless it is Trainer's:
            a ``checkpoint-N``, which Trainer fills in several steps (and whose weights it looks for under the plain
            name), or an output_dir with such checkpoints in it, where all else stays as it is.
        tokenizer: saved beside the model.
        run: what made it, written as run.json (see `factormix.run.record`).
        kwargs: ``state_dict`` and ``max_shard_size`` go to transformers' save_pretrained; its other arguments
            are refused.

    Raises:
        FactorMixError: not a FactorMix model, int8 weights, an argument that is not supported, an existing directory, a
            full disk.
    """
    refuse_quantised(model, "a FactorMix directory")
    if not isinstance(model, FactorMixMixin):
        raise FactorMixError(
            f"{type(model).__name__} has no sparse FFN; factorize it first, or use its own save_pretrained."
        )
    passed_on = {k: value for k in ("state_dict", "max_shard_size") if (value := kwargs.pop(k, None)) is not None}
    writes = kwargs.pop("is_main_process", True)  # Trainer and accelerate: the other processes have nothing to write
    kwargs.pop("save_peft_format", None)
    if kwargs.pop("safe_serialization", True) is False or kwargs.pop("push_to_hub", False) or kwargs:
        raise FactorMixError(
            f"save_pretrained of a FactorMix model takes save_directory, tokenizer, overwrite, state_dict and "
            f"max_shard_size, not {sorted(kwargs) or 'safe_serialization=False or push_to_hub=True'}."
        )
    if not writes:
        return
    dense = base_class(model)
    trainers = Path(path).name.startswith("checkpoint-")
    beside = [] if overwrite else _of_trainer(Path(path))
    with output_directory(path, overwrite or trainers or bool(beside)) as folder:
        dense.save_pretrained(model, folder, variant=None if trainers else VARIANT, **passed_on)
        model.config.architectures = [dense.__name__]
        base_config = model.config.to_dict()
        factormix = base_config.pop("factormix")
        base_config.pop("_name_or_path", None)  # where the maker had the dense model: no business of the reader's
        config = FactorMixConfig(base_config, dense.__name__, factormix, architectures=[dense.__name__])
        write_json(folder / "config.json", json.loads(config.to_json_string(use_diff=True)))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if run is not None:
            write_json(folder / "run.json", run)
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        for file in files:  # safetensors makes its files readable by their owner alone
            shutil.copymode(folder / "config.json", file)
        write_json(folder / HASHES, {str(p.relative_to(folder)): sha256(p) for p in files})
        for entry in beside:
            if not (folder / entry.name).exists():
                _link(entry, folder / entry.name)


def _of_trainer(path: Path) -> list[Path]:
    """What stays in Trainer's output_dir beside a model saved there: all but a former model. Empty elsewhere."""
    if not any(path.glob("checkpoint-*/trainer_state.json")):
        return []
    return [entry for entry in path.iterdir() if entry.name != HASHES and not entry.match("model*.safetensors*")]


def _link(entry: str | Path, to: str | Path) -> None:
    """The same files under a second name: the first stays until the new directory is in its place. No copy where the
    file system has hard links."""
    if Path(entry).is_dir():
        shutil.copytree(entry, to, copy_function=_link)
        return
    try:
        os.link(entry, to)
    except OSError:
        shutil.copy2(entry, to)


def load(
    path: str | Path,
    dtype: torch.dtype | str = "auto",
    device_map: str | dict[str, Any] | None = None,
    auto_class: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a FactorMix directory as a transformers model in eval mode.

    Args:
        path: a directory that `save` wrote, or the hub name of one.
        dtype: of the weights; "auto" keeps the file's.
        device_map: as in transformers.
        auto_class: e.g. "AutoModelForSequenceClassification" for another head than the saved one; new heads are then
            freshly initialised, as in transformers.
        kwargs: further arguments of transformers' from_pretrained, e.g. attn_implementation, and fields of the dense
            config to change, e.g. num_labels.

    Raises:
        FactorMixError: not such a directory, a file missing, altered or truncated (named), tensors missing,
            unexpected or of another shape (named).
    """
    if (older := kwargs.pop("torch_dtype", None)) is not None and dtype == "auto":
        dtype = older
    folder = _local(path, kwargs)
    config = read_config(folder)
    verify(folder)
    model_type = config.base_config["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise FactorMixError(
            f"{str(folder / 'config.json')!r} was made of a {model_type!r} model, which transformers "
            f"{transformers.__version__} does not know. Upgrade transformers."
        )
    new_sizes = kwargs.pop("ignore_mismatched_sizes", False)  # transformers' way to another number of labels
    attention = {k: kwargs.pop(k) for k in ("attn_implementation",) if k in kwargs}  # checked by from_pretrained
    base_config, kwargs = CONFIG_MAPPING[model_type].from_dict(config.base_config, return_unused_kwargs=True, **kwargs)
    base_config.factormix = config.factormix
    saved = _architecture(config.architecture, folder)
    base = saved if auto_class is None else _headed(auto_class, base_config)
    cls: Any = factormix_class(base)
    variant = VARIANT if any(VARIANT in file.name for file in folder.glob("model*")) else None
    model, info = cls.from_pretrained(
        folder, config=base_config, dtype=dtype, device_map=device_map, output_loading_info=True,
        variant=variant, use_safetensors=True, local_files_only=True, ignore_mismatched_sizes=True,
        **attention, **kwargs,
    )  # fmt: skip
    _refuse_incomplete(info, folder, strict=base is saved and not new_sizes)
    return cast(PreTrainedModel, model.eval())


def read_config(folder: Path) -> FactorMixConfig:
    """config.json of a FactorMix directory.

    Raises:
        FactorMixError: absent, unreadable, of another kind or of a newer format.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise FactorMixError(f"{str(folder)!r} has no config.json, so it is no model directory.")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FactorMixError(f"{str(file)!r} is not JSON ({error}); the directory is damaged. Make it anew.") from error
    if not isinstance(raw, dict):
        raise FactorMixError(
            f"{str(file)!r} holds a JSON {type(raw).__name__}, not an object; the directory is damaged."
        )
    if raw.get("model_type") != "factormix":
        raise FactorMixError(
            f"{str(folder)!r} holds a {raw.get('model_type')!r} model, not a FactorMix one. Load it with transformers, "
            "or make it sparse with `factormix factor`."
        )
    config = FactorMixConfig.from_dict(raw)
    if config.format_version != FORMAT_VERSION:
        raise FactorMixError(
            f"{str(file)!r} has format_version {config.format_version}; this FactorMix reads {FORMAT_VERSION}. "
            "Upgrade FactorMix."
        )
    if not isinstance(config.factormix.get("sites"), dict) or "model_type" not in config.base_config:
        raise FactorMixError(
            f"{str(file)!r} lacks factormix.sites or base_config.model_type; the directory is damaged."
        )
    return config


def empty(config: FactorMixConfig) -> PreTrainedModel:
    """The model of a FactorMix directory's config on the meta device: every shape, no weights."""
    base_config = CONFIG_MAPPING[config.base_config["model_type"]].from_dict(config.base_config)
    base_config.factormix = config.factormix
    with torch.device("meta"):
        return factormix_class(_architecture(config.architecture, Path()))(base_config)


def verify(folder: Path) -> None:
    """Compare every file with hashes.json.

    Raises:
        FactorMixError: names the file that is missing or differs.
    """
    try:
        hashes: dict[str, str] = dict(json.loads((folder / HASHES).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise FactorMixError(
            f"{str(folder / HASHES)!r} is missing or unreadable ({error}); cannot trust this directory."
        ) from error
    check_hashes(folder, hashes, HASHES)
    extra = sorted(p.name for p in folder.glob("*.safetensors") if p.name not in hashes)
    if extra:
        raise FactorMixError(f"{str(folder / extra[0])!r} is not listed in {HASHES}: a foreign weight file. Remove it.")


def is_factormix(path: str | Path) -> bool:
    """True for a directory whose config.json says model_type factormix."""
    file = Path(path) / "config.json"
    try:
        return bool(json.loads(file.read_text(encoding="utf-8")).get("model_type") == "factormix")
    except (OSError, ValueError, AttributeError):
        return False


def _local(path: str | Path, kwargs: dict[str, Any]) -> Path:
    """The directory on disk; a hub name is fetched (safetensors and JSON only)."""
    if kwargs.pop("use_safetensors", True) is False:
        raise FactorMixError("a FactorMix directory holds safetensors only: leave use_safetensors out.")
    options = {k: kwargs.pop(k) for k in ("revision", "cache_dir", "token", "local_files_only") if k in kwargs}
    if Path(path).is_dir():
        return Path(path)
    if str(path).count("/") != 1 or str(path).startswith((".", "/")):
        raise FactorMixError(f"model {str(path)!r} is not a directory here, and no hub name (owner/name) either.")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    return Path(snapshot_download(str(path), allow_patterns=patterns, **options))


def _architecture(name: str, folder: Path) -> type[PreTrainedModel]:
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise FactorMixError(
            f"{str(folder / 'config.json')!r} names the architecture {name!r}, which transformers "
            f"{transformers.__version__} does not have. Upgrade transformers."
        )
    return found


def _headed(auto_class: str, config: PretrainedConfig) -> type[PreTrainedModel]:
    """The family's class for an Auto class, e.g. BertForSequenceClassification."""
    mapping = getattr(transformers, auto_class)._model_mapping
    if type(config) not in mapping.keys():  # noqa: SIM118 - a lazy mapping without __contains__ by type
        raise FactorMixError(f"{auto_class} has no {config.model_type!r} model.")
    found = mapping[type(config)]
    return cast(type[PreTrainedModel], found[0] if isinstance(found, (list, tuple)) else found)


def _refuse_incomplete(info: dict[str, Any], folder: Path, strict: bool) -> None:
    """Every tensor accounted for; with another head than the saved one, only the sparse FFNs' need be."""
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(
            n if isinstance(n, str) else f"{n[0]} {tuple(n[1])} for {tuple(n[2])}" for n in info.get(what) or []
        )
        if not strict:
            parts = (".experts.", ".router.", ".shared.")
            names = [n for n in names if any(part in n for part in parts)]
        if names:
            word = what.replace("_", " ").replace("keys", "tensors")
            raise FactorMixError(
                f"{str(folder)!r}: {word}: {', '.join(names[:5])} ({len(names)} in all). The directory is damaged."
            )


def _changes(config: FactorMixConfig) -> dict[str, Any]:
    """What a caller of an Auto class asked for (num_labels=3, attn_implementation="eager"): Auto classes put such
    arguments into the config they read, and hand on only the rest. `save` writes none of these fields itself."""
    own = {"base_config", "architecture", "architectures", "factormix", "format_version", "dtype"}
    plain, asked = FactorMixConfig().to_dict(), config.to_dict()
    changed = {k: v for k, v in asked.items() if k not in own and not k.startswith("_") and plain.get(k) != v}
    if config._attn_implementation is not None:
        changed["attn_implementation"] = config._attn_implementation
    return changed


def _register() -> None:
    """Make transformers' Auto classes load FactorMix directories: one small class for each Auto class."""
    AutoConfig.register(FactorMixConfig.model_type, FactorMixConfig, exist_ok=True)
    for auto_name in dir(modeling_auto):
        auto: Any = getattr(modeling_auto, auto_name)
        if not (auto_name.startswith("AutoModel") and hasattr(auto, "_model_mapping")):
            continue

        def from_pretrained(
            cls: Any, path: Any, *args: Any, config: Any = None, _auto: str = auto_name, **kw: Any
        ) -> Any:
            kw.pop("trust_remote_code", None)  # there is none
            return load(path, auto_class=_auto, **{**_changes(config), **kw})

        def from_config(cls: Any, config: Any, **kw: Any) -> Any:
            raise FactorMixError("a FactorMix model is not made from a config alone: use from_pretrained.")

        stub = type(
            f"FactorMix{auto_name}",
            (PreTrainedModel,),
            {
                "config_class": FactorMixConfig,
                "from_pretrained": classmethod(from_pretrained),
                "_from_config": classmethod(from_config),
            },
        )
        auto.register(FactorMixConfig, stub, exist_ok=True)


FactorMixMixin.write_directory = staticmethod(save)
_register()
