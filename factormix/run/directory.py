"""Output that is either whole or absent: atomic directories and files, whatever kills the process in between.

Run it::

    check_output(out, overwrite)                      # refuse before hours of compute, not after
    with output_directory(out, overwrite) as folder:  # a temporary sibling of `out`
        write_json(folder / "config.json", config)
    # only here does `out` exist, or hold the new result instead of the old
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from factormix.run.errors import FactorMixError

try:
    import fcntl
except ImportError:  # no fcntl on Windows: leftovers of killed runs are then not recognised
    fcntl = None  # type: ignore[assignment]

STALE_SECONDS = 60.0  # a younger leftover may be a folder that its process has made and not yet locked
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


def check_output(path: str | Path, overwrite: bool = False) -> None:
    """Raise FactorMixError when `output_directory(path, overwrite)` would refuse, or could not write there.

    A result that a kill caught half-way through being replaced is put back first.
    """
    path = Path(path).resolve()
    _restore(path)
    if path.exists() and not path.is_dir():
        raise FactorMixError(f"output {str(path)!r} is an existing file; name a directory.")
    if path.exists() and any(path.iterdir()):
        if not overwrite:
            raise FactorMixError(
                f"output {str(path)!r} exists and is not empty; choose another, or replace it with --overwrite."
            )
        for kept in (Path.cwd(), Path.home()):
            if kept.resolve().is_relative_to(path):
                raise FactorMixError(f"refusing to overwrite {str(path)!r}: it contains {str(kept)!r}.")
    parent = next(folder for folder in path.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise FactorMixError(f"output {str(path)!r} cannot be written: no write permission in {str(parent)!r}.")


def check_output_file(path: Path, overwrite: bool = False) -> None:
    """Raise FactorMixError for a directory, an existing file without `overwrite`, or a file in no directory."""
    if path.is_dir():
        raise FactorMixError(f"output {str(path)!r} is a directory; name a file in it.")
    if path.exists() and not overwrite:
        raise FactorMixError(f"output {str(path)!r} exists; choose another name, or replace it with --overwrite.")
    if not path.absolute().parent.is_dir():
        raise FactorMixError(f"output {str(path)!r}: there is no directory {str(path.parent)!r}; make it first.")


@contextlib.contextmanager
def output_directory(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it becomes `path` in one step, on failure it is removed.

    Args:
        path: the directory to create. A symbolic link is followed and stays a link.
        overwrite: allow a non-empty `path`. The old result stays whole until the new one is complete on disk, is
            then exchanged with it, and only after that is removed.

    Raises:
        FactorMixError: `path` is a file, or not empty without `overwrite`, or the disk is full.
    """
    path = Path(path).resolve()
    check_output(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path)
    temporary = path.parent / f".{path.name}.tmp-{secrets.token_hex(4)}"
    with _full_disk_is_an_error(path):
        temporary.mkdir()
        lock = _lock(temporary)
        try:
            yield temporary
            check_output(path, overwrite)  # another process may have finished first
            _sync_tree(temporary)
            _put_in_place(temporary, path)
        finally:
            if lock is not None:
                os.close(lock)
            shutil.rmtree(temporary, ignore_errors=True)  # on success it is gone, or holds the old result


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file name beside `path`; on success it is flushed to disk and renamed to `path`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    with _full_disk_is_an_error(path):
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented JSON, atomically. Paths become strings, numbers of torch and numpy plain numbers,
    configs dicts, and NaN and infinities null (JSON has none)."""
    text = json.dumps(_json_ready(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(file: Path, version: int) -> dict[str, Any]:
    """A JSON object with this format_version.

    Raises:
        FactorMixError: absent, damaged, or of another format.
    """
    if not file.is_file():
        raise FactorMixError(f"{str(file.parent)!r} has no {file.name}; it is not what is needed here, or incomplete.")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        found = values["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise FactorMixError(f"{str(file)!r} is damaged ({error!r}). Copy or make it anew.") from error
    if found != version:
        raise FactorMixError(f"{str(file)!r} has format_version {found}; this FactorMix reads {version}. Upgrade it.")
    return dict(values)


def check_hashes(folder: Path, hashes: Mapping[str, str], listed_in: str) -> None:
    """Compare files, by their paths from `folder`, with the SHA-256 that `listed_in` has of them.

    Raises:
        FactorMixError: names the file that is missing or differs.
    """
    for name, digest in hashes.items():
        file = folder / name
        if not file.is_file():
            raise FactorMixError(f"{str(file)!r} is missing; the directory is incomplete. Copy or make it anew.")
        if sha256(file) != digest:
            raise FactorMixError(f"{str(file)!r} was altered or truncated: its SHA-256 is not the one in {listed_in}.")


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`; a non-empty `path` is exchanged, so that at no moment neither is there."""
    if not path.exists() or not any(path.iterdir()):
        if path.exists():
            path.rmdir()
        os.rename(temporary, path)
    elif not _exchange(temporary, path):
        old = path.parent / f".{path.name}.old-{secrets.token_hex(4)}"
        os.rename(path, old)  # killed here, `_restore` puts it back at the next run
        try:
            os.rename(temporary, path)
        except BaseException:
            os.rename(old, path)
            raise
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    _sync(path.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step (Linux renameat2 with RENAME_EXCHANGE); False where that is not to be had."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    return renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0


def _restore(path: Path) -> None:
    """Put back a result that was moved aside by a process killed before it could rename the new one into place."""
    if path.parent.is_dir() and not path.exists():
        aside = sorted(path.parent.glob(f".{_escape(path.name)}.old-*"), key=lambda old: old.stat().st_mtime)
        if aside:
            os.rename(aside[-1], path)


def _remove_stale(path: Path) -> None:
    """Remove temporaries of killed runs: those that no living process holds locked."""
    if fcntl is None:
        return
    for folder in path.parent.glob(f".{_escape(path.name)}.tmp-*"):
        try:
            old = folder.is_dir() and time.time() - folder.stat().st_mtime > STALE_SECONDS
            lock = _lock(folder) if old else None
        except OSError:  # removed by another process meanwhile
            continue
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """An open, locked descriptor of `folder`, or None when another process holds it. A kill releases it."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextlib.contextmanager
def _full_disk_is_an_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL_DISK:
            raise
        raise FactorMixError(
            f"the disk is full while writing {str(path)!r}; nothing there was changed. Free some space and run again."
        ) from error


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows opens no directories
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            if not os.path.islink(os.path.join(root, name)):
                _sync(Path(root, name))
        _sync(Path(root))


def _escape(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _json_ready(obj: Any) -> Any:
    if obj is None or isinstance(obj, str | bool | int):
        return obj
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if hasattr(obj, "to_dict"):
        return _json_ready(obj.to_dict())
    if isinstance(obj, Mapping):
        return {str(key): _json_ready(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple | set | frozenset):
        items = sorted(obj, key=repr) if isinstance(obj, set | frozenset) else obj
        return [_json_ready(item) for item in items]
    if hasattr(obj, "tolist"):  # torch and numpy scalars and arrays
        return _json_ready(obj.tolist())
    return str(obj)
