"""run.json, memory figures, progress on stderr."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from factormix.run.config import Config, option
from factormix.run.progress import progress, say
from factormix.run.record import RunRecord, current_memory_bytes, peak_memory_bytes


@dataclass(frozen=True)
class Tiny(Config):
    tokens: int = option(3, help="tokens")


def test_record_is_whole_and_documented(tmp_path: Path) -> None:
    record = RunRecord("factorize", Tiny(), seed=0, data={"brown": "ab"})
    with record.phase("fit"):
        time.sleep(0.02)
    with pytest.raises(RuntimeError), record.phase("fit"):
        raise RuntimeError
    record.metrics["perplexity"] = float("inf")
    record.write(tmp_path / "run.json")
    read = json.loads((tmp_path / "run.json").read_text())
    assert next(iter(read)) == "schema_version" and read["schema_version"] == 1
    assert read["config"] == {"tokens": 3} and read["metrics"] == {"perplexity": None}
    assert [phase["name"] for phase in read["phases"]] == ["fit", "fit"] and record.seconds("fit") >= 0.02
    assert read["versions"]["torch"] == torch.__version__ and read["threads"] == torch.get_num_threads()
    assert read["peak_memory_bytes"] > 50 * 2**20
    assert all(f"\n        {name}: " in (RunRecord.__doc__ or "") or name in ("command",) for name in read)


def test_memory_helpers_see_an_allocation() -> None:
    before = current_memory_bytes()
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert current_memory_bytes() - before > 48 * 2**20
    assert peak_memory_bytes() >= current_memory_bytes() - 2**20
    del block


def test_progress_and_messages_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(3), "fitting")) == [0, 1, 2]
    say("hello")
    out, err = capsys.readouterr()
    assert out == "" and "fitting" in err and "hello" in err
    assert list(progress(iter(range(3)), "fitting", total=3, quiet=True)) == [0, 1, 2]
    say("hello", quiet=True)
    assert capsys.readouterr() == ("", "")
