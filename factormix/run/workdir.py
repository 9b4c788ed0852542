"""A scratch folder beside the output that lets a killed run go on where it stopped.

Run it::

    work = WorkDirectory(f"{out}.work", fingerprint={"model": ..., "text": sha, "config": ...})
    if not work.done("statistics"):
        work.save("statistics", tensors, {"tokens": 16384})
    tensors, meta = work.load("statistics")
    work.remove()  # once the output is in place

On disk: ``fingerprint.json``, and for each stage ``<stage>.safetensors`` and, written after it, ``<stage>.json`` with
the meta data and the hash of both. A stage counts as done only when both are whole.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from factormix.run.directory import atomic_path, sha256, write_json
from factormix.run.errors import FactorMixError


class WorkDirectory:
    """Stages of one run, kept across kills.

    Args:
        path: the folder, by custom ``<output>.work``.
        fingerprint: all that the stages depend on (model, data hashes, config); JSON values, nesting allowed.
        overwrite: another run's stages, or damaged ones, make way; this run's own go on all the same.

    Raises:
        FactorMixError: the folder belongs to a run with another fingerprint (the differing keys are named), or is
            not a work directory.
    """

    def __init__(self, path: str | Path, fingerprint: dict[str, Any], overwrite: bool = False) -> None:
        self.path = Path(path)
        self._fingerprint_file = self.path / "fingerprint.json"
        if self.path.exists():
            self._open(json.loads(json.dumps(fingerprint, default=str)), overwrite)
        if not self._fingerprint_file.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self._fingerprint_file, fingerprint)

    def _open(self, wanted: dict[str, Any], overwrite: bool) -> None:
        known = self._fingerprint_file.exists()
        if not known and (not self.path.is_dir() or any(not f.name.startswith(".") for f in self.path.iterdir())):
            raise FactorMixError(
                f"{str(self.path)!r} exists and is not a FactorMix work directory (no fingerprint.json); "
                "move it away or choose another output."
            )
        if not known:
            return
        try:
            self._refuse_another(wanted)
        except FactorMixError:
            if not overwrite:
                raise
            self.remove()

    def _refuse_another(self, wanted: dict[str, Any]) -> None:
        try:
            found = json.loads(self._fingerprint_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise FactorMixError(f"{str(self._fingerprint_file)!r} is damaged; start anew with --overwrite.") from error
        differences = _differences(found, wanted)
        if differences:
            raise FactorMixError(
                f"{str(self.path)!r} holds the work of another run; differing: {'; '.join(differences)}. "
                "Run with the old settings to resume it, or start anew with --overwrite."
            )

    def done(self, stage: str) -> bool:
        """True when the stage is saved and whole; a missing, cut off or altered file counts as not done."""
        return self._read(stage) is not None

    def save(self, stage: str, tensors: dict[str, torch.Tensor], meta: dict[str, Any] | None = None) -> None:
        """Store a stage (tensors of any device and dtype, and JSON values), replacing an earlier one."""
        file = self._file(stage)
        with atomic_path(file) as temporary:
            save_file(_storable(tensors), temporary)
            digest = sha256(temporary)
        meta_text = json.dumps(meta or {}, sort_keys=True)
        write_json(
            file.with_suffix(".json"),
            {"tensors_sha256": digest, "meta_sha256": _text_sha256(meta_text), "meta": meta_text},
        )

    def load(self, stage: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The tensors (on the CPU) and meta data of a stage that is `done`; FactorMixError otherwise."""
        meta = self._read(stage)
        if meta is None:
            raise FactorMixError(f"stage {stage!r} is not done in {str(self.path)!r}; run it first.")
        return load_file(self._file(stage)), meta

    @contextmanager
    def removed_if_without(self, pattern: str) -> Iterator[None]:
        """Around the work: where it fails before any file matches `pattern`, there is nothing to resume and the folder
        goes."""
        try:
            yield
        except BaseException:
            if not any(self.path.glob(pattern)):
                self.remove()
            raise

    def remove(self) -> None:
        """Delete the folder and all stages."""
        self._fingerprint_file.unlink(missing_ok=True)  # first: what a kill leaves behind must not resume
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, stage: str) -> Path:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", stage) or stage == "fingerprint":
            raise FactorMixError(f"stage name {stage!r} received; allowed: letters, digits, '_' and '-'.")
        return self.path / f"{stage}.safetensors"

    def _read(self, stage: str) -> dict[str, Any] | None:
        file = self._file(stage)
        try:
            entry = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
            whole = _text_sha256(entry["meta"]) == entry["meta_sha256"] and sha256(file) == entry["tensors_sha256"]
            return json.loads(entry["meta"]) if whole else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def _storable(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous CPU tensors that share no memory, as safetensors wants them."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        out[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return out


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _differences(found: Any, wanted: Any, where: str = "") -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted(found.keys() | wanted.keys())
        absent = "(absent)"
        return [
            difference
            for key in keys
            for difference in _differences(
                found.get(key, absent), wanted.get(key, absent), f"{where}.{key}" if where else key
            )
        ]
    return [] if found == wanted else [f"{where} was {found!r}, is {wanted!r}"]
