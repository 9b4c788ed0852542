"""A killed run goes on where it stopped, and only with the settings it was started with."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from factormix.run.errors import FactorMixError
from factormix.run.workdir import WorkDirectory

FINGERPRINT = {"model": "m", "config": {"tokens": 16384, "layers": (1, 2)}, "text": Path("a.txt")}


def test_resume_with_the_same_fingerprint(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path / "out.work", FINGERPRINT)
    assert not work.done("fit-00")
    base = torch.arange(6.0).reshape(2, 3)
    tensors = {
        "a": base,
        "view": base.T,
        "same": base,
        "half": torch.ones(2, dtype=torch.bfloat16),
        "n": torch.tensor(3),
    }
    work.save("fit-00", tensors, {"loss": 0.5})
    work.save("empty", {})
    again = WorkDirectory(tmp_path / "out.work", FINGERPRINT)
    loaded, meta = again.load("fit-00")
    assert meta == {"loss": 0.5} and loaded.keys() == tensors.keys()
    assert all(
        torch.equal(loaded[name], tensors[name]) and loaded[name].dtype == tensors[name].dtype for name in tensors
    )
    assert again.load("empty") == ({}, {})
    again.save("fit-00", {"a": base + 1})
    assert torch.equal(work.load("fit-00")[0]["a"], base + 1)
    again.remove()
    assert not (tmp_path / "out.work").exists()


def test_another_fingerprint_is_refused_by_key(tmp_path: Path) -> None:
    WorkDirectory(tmp_path / "w", FINGERPRINT).save("one", {"a": torch.ones(1)})
    changed = {**FINGERPRINT, "config": {"tokens": 32768, "layers": [1, 2]}, "seed": 0}
    with pytest.raises(FactorMixError) as caught:
        WorkDirectory(tmp_path / "w", changed)
    message = str(caught.value)
    assert "config.tokens was 16384, is 32768" in message and "seed was '(absent)', is 0" in message
    assert "--overwrite" in message and "layers" not in message
    work = WorkDirectory(tmp_path / "w", changed, overwrite=True)
    assert not work.done("one")
    WorkDirectory(tmp_path / "w", changed)


def test_a_foreign_folder_is_refused_even_with_overwrite(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(FactorMixError, match="not a FactorMix work directory"):
            WorkDirectory(tmp_path, FINGERPRINT, overwrite)
    assert (tmp_path / "thesis.tex").exists()


def test_a_damaged_fingerprint_is_refused(tmp_path: Path) -> None:
    WorkDirectory(tmp_path / "w", FINGERPRINT)
    (tmp_path / "w" / "fingerprint.json").write_text("{")
    with pytest.raises(FactorMixError, match="damaged.*--overwrite"):
        WorkDirectory(tmp_path / "w", FINGERPRINT)
    WorkDirectory(tmp_path / "w", FINGERPRINT, overwrite=True)


@pytest.mark.parametrize("damage", ["cut", "flip", "meta", "json", "missing", "old meta"])
def test_a_damaged_stage_counts_as_not_done(tmp_path: Path, damage: str) -> None:
    work = WorkDirectory(tmp_path / "w", FINGERPRINT)
    work.save("one", {"a": torch.ones(100)}, {"loss": 0.5})
    tensors, meta = tmp_path / "w" / "one.safetensors", tmp_path / "w" / "one.json"
    data, text = tensors.read_bytes(), meta.read_text()
    if damage == "cut":
        tensors.write_bytes(data[:-10])
    elif damage == "flip":
        tensors.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "meta":
        meta.write_text(text.replace("0.5", "0.6"))
    elif damage == "json":
        meta.write_text(text[: len(text) // 2])
    elif damage == "missing":
        tensors.unlink()
    else:
        work.save("one", {"a": torch.zeros(100)}, {"loss": 0.1})
        meta.write_text(text)
    assert not work.done("one")
    with pytest.raises(FactorMixError, match="'one' is not done"):
        work.load("one")
    work.save("one", {"a": torch.ones(100)})
    assert work.done("one")


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a.b", "fingerprint"])
def test_stage_names_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(FactorMixError, match="stage name"):
        WorkDirectory(tmp_path / "w", FINGERPRINT).save(name, {})


@pytest.mark.parametrize("moment", ["mid-write", "after the tensors"])
def test_kill_in_mid_save(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "w"
    work = WorkDirectory(path, {"a": 1})
    work.save("one", {"a": torch.ones(3)}, {"version": "old"})
    work.save("two", {"a": torch.ones(3)}, {"version": "old"})
    code = f"""
import os, signal, torch
from factormix.run import workdir
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
def half(tensors, file):
    file.write_bytes(b"half a fi")
    die()
if {moment!r} == "mid-write":
    workdir.save_file = half
else:
    workdir.write_json = die
work = workdir.WorkDirectory({str(path)!r}, {{"a": 1}})
assert work.done("one")
work.save("two", {{"a": torch.zeros(3)}}, {{"version": "new"}})
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    again = WorkDirectory(path, {"a": 1})
    assert again.load("one")[1] == {"version": "old"}
    if moment == "mid-write":
        assert again.load("two")[1] == {"version": "old"} and torch.equal(again.load("two")[0]["a"], torch.ones(3))
    else:
        assert not again.done("two")  # new tensors, old meta data: never served together


def test_overwrite_keeps_this_runs_own_stages(tmp_path: Path) -> None:
    WorkDirectory(tmp_path / "w", FINGERPRINT).save("one", {}, {"n": 1})
    assert WorkDirectory(tmp_path / "w", FINGERPRINT, overwrite=True).done("one")


@pytest.mark.parametrize("stages", [0, 1])
def test_a_failure_with_nothing_to_resume_leaves_no_folder(tmp_path: Path, stages: int) -> None:
    work = WorkDirectory(tmp_path / "w", FINGERPRINT)
    for number in range(stages):
        work.save(f"site-{number}", {})
    with pytest.raises(KeyboardInterrupt), work.removed_if_without("site-*.json"):
        raise KeyboardInterrupt
    assert work.path.exists() == bool(stages)
