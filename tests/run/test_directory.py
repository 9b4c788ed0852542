"""Output is whole or absent: refusals, SIGKILL at every awkward moment, a full disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from factormix.run import directory
from factormix.run.directory import atomic_path, check_output, output_directory, sha256, write_json
from factormix.run.errors import FactorMixError


def make(path: Path, text: str, overwrite: bool = False) -> None:
    with output_directory(path, overwrite) as folder:
        for part in range(3):
            (folder / f"{part}.txt").write_text(text)


def content(path: Path) -> set[str]:
    assert sorted(file.name for file in path.iterdir()) == ["0.txt", "1.txt", "2.txt"]
    return {file.read_text() for file in path.iterdir()}


def run_and_expect_kill(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_new_empty_and_overwritten(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "deep" / "new", tmp_path / "empty"):
        make(out, "one")
        assert content(out) == {"one"}
        with pytest.raises(FactorMixError, match="not empty.*--overwrite"):
            make(out, "two")
        make(out, "two", overwrite=True)
        assert content(out) == {"two"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "empty"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["new"]


def test_permissions_are_those_of_any_new_directory(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    make(tmp_path / "out", "one")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_check_output_refuses_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(FactorMixError, match="existing file"):
            check_output(tmp_path / "file", overwrite)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FactorMixError, match="refusing to overwrite.*contains"):
        check_output(tmp_path.parent, overwrite=True)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(FactorMixError, match="no write permission"):
        check_output(tmp_path / "a" / "b")


def test_an_exception_leaves_the_old_result_and_no_litter(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, "old")
    with pytest.raises(RuntimeError, match="boom"), output_directory(out, overwrite=True) as folder:
        (folder / "0.txt").write_text("new")
        raise RuntimeError("boom")
    assert content(out) == {"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_symbolic_link_stays_a_link(tmp_path: Path) -> None:
    make(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    make(tmp_path / "link", "new", overwrite=True)
    assert (tmp_path / "link").is_symlink() and content(tmp_path / "real") == {"new"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("where", ["write", "fsync", "rename"])
def test_a_full_disk_leaves_the_old_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, number: int
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    out = tmp_path / "out"
    make(out, "old")
    target, name = {"write": (Path, "write_text"), "fsync": (os, "fsync"), "rename": (directory, "_exchange")}[where]
    monkeypatch.setattr(target, name, full)
    with pytest.raises(FactorMixError, match="disk is full"):
        make(out, "new", overwrite=True)
    monkeypatch.undo()
    assert content(out) == {"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_system_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="odd") as caught, output_directory(tmp_path / "out"):
        raise OSError(errno.EIO, "odd")
    assert not isinstance(caught.value, FactorMixError)


def test_without_exchange_a_failed_rename_puts_the_old_result_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "out", os.rename
    make(out, "old")

    def fail_into_place(source: Path, target: Path) -> None:
        if ".tmp-" in str(source):
            raise OSError(errno.ENOSPC, "full")
        rename(source, target)

    monkeypatch.setattr(directory, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", fail_into_place)
    with pytest.raises(FactorMixError, match="disk is full"):
        make(out, "new", overwrite=True)
    assert content(out) == {"old"}
    monkeypatch.setattr(os, "rename", rename)
    make(out, "new", overwrite=True)
    assert content(out) == {"new"} and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_kill_while_writing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, "old")
    run_and_expect_kill(f"""
import os, signal
from factormix.run.directory import output_directory
with output_directory({str(out)!r}, overwrite=True) as folder:
    (folder / "0.txt").write_text("new")
    os.kill(os.getpid(), signal.SIGKILL)
""")
    assert content(out) == {"old"}
    left = next(path for path in tmp_path.iterdir() if path != out)
    os.utime(left, (0, 0))  # old enough to count as left behind
    make(out, "new", overwrite=True)
    assert content(out) == {"new"} and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_living_process_keeps_its_temporary(tmp_path: Path) -> None:
    with output_directory(tmp_path / "out") as folder:
        os.utime(folder, (0, 0))
        make(tmp_path / "out", "other")
        assert folder.exists()
        with pytest.raises(FactorMixError, match="not empty"):
            check_output(tmp_path / "out")
        (tmp_path / "out").rename(tmp_path / "elsewhere")


def test_kill_between_the_two_renames_is_repaired_by_the_next_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, "old")
    run_and_expect_kill(f"""
import os, signal
from factormix.run import directory
directory._exchange = lambda *_: False
rename = os.rename
def kill_in_between(source, target):
    if ".tmp-" in str(source):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.rename = kill_in_between
with directory.output_directory({str(out)!r}, overwrite=True) as folder:
    (folder / "0.txt").write_text("new")
""")
    assert not out.exists()
    with pytest.raises(FactorMixError, match="not empty"):
        check_output(out)
    assert content(out) == {"old"}


def test_kill_at_any_moment_leaves_one_whole_version(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, "start" * 1000)
    code = f"""
import itertools
from factormix.run.directory import output_directory
for i in itertools.count():
    with output_directory({str(out)!r}, overwrite=True) as folder:
        for part in range(3):
            (folder / f"{{part}}.txt").write_text(f"{{i:05}}" * 1000)
    print(i, flush=True)
"""
    seen, chance = set(), random.Random(0)
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.random() * 0.05)
        process.kill()
        process.wait()
        process.stdout.close()
        (text,) = content(out)  # one version, not a mixture
        assert len(text) == 5000
        seen.add(text)
    assert "start" * 1000 not in seen


def test_write_json_values_and_order(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": Path("x"), "a": [float("nan"), 1.5, np.float32(2), torch.tensor([3])], "c": {"ü"}})
    assert json.loads(path.read_text()) == {"b": "x", "a": [None, 1.5, 2.0, [3]], "c": ["ü"]}
    assert path.read_text().index('"b"') < path.read_text().index('"a"')


def test_kill_while_writing_json_leaves_the_old(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"version": "old"})
    run_and_expect_kill(f"""
import os, signal
from factormix.run import directory
directory._sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)
directory.write_json({str(path)!r}, {{"version": "new"}})
""")
    assert json.loads(path.read_text()) == {"version": "old"}


def test_a_failed_file_leaves_the_old_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(FactorMixError, match="disk is full"), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "full")
    assert path.read_text() == "1\n" and [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
