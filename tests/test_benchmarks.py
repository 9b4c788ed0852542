"""The scripts of benchmarks/ that need other machines still run, at sizes that mean nothing."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", BENCHMARKS / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_gpu_measures_on_a_cpu_too(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--device", "cpu", "--shape", "tiny", "--rounds", "1", "--json", str(tmp_path / "gpu.json")])
    report = json.loads((tmp_path / "gpu.json").read_text())
    rows = report["rows"]
    assert report["measured"] and {row["phase"] for row in rows} == {"decode", "prefill", "ffn"}
    assert {row["contender"] for row in rows} >= {"dense", "S4A4E16", "S2A2E16"}
    assert all(row["microseconds"] > 0 for row in rows) and "| decode |" in capsys.readouterr().out
    assert all(row["allowed"] > 1 for row in rows if row["contender"] in gpu.LAYOUTS and row["size"] == 1)


def test_gpu_without_one_prints_an_estimate_and_says_so(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main(["--json", str(tmp_path / "gpu.json")])
    report, out = json.loads((tmp_path / "gpu.json").read_text()), capsys.readouterr().out
    assert "ESTIMATE" in out and "H100" in out and not report["measured"]
    assert {row["mode"] for row in report["rows"]} == {"roofline"}
