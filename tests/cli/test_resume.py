"""kill -9 in the middle, the same command again: it goes on, and ends where an uninterrupted run ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from factormix.run.directory import sha256
from tests.cli.tiny import save_tiny, write_text
from tests.families import TINY, tiny_config

MAIN = "from factormix.cli import main; main()"
LAYERS, PATIENCE = 8, 300.0  # seconds: a busy machine takes many times what a quiet one does


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A llama of more layers than the others', so that there is a middle."""
    folder = save_tiny("llama", tmp_path / "model")
    config = LlamaConfig(**{**TINY["llama"].options, "num_hidden_layers": LAYERS})
    config.architectures = tiny_config("llama").architectures
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def command(model: Path, text: Path, out: str, *more: str) -> list[str]:
    flags = "--layout S1A1E4 --tokens 2048 --window 32 --router-steps 400".split()
    words = ["factor", str(model), "-o", out, "--text", str(text), *flags, *more]
    return [sys.executable, "-c", MAIN, *words]


def start(words: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def kill_after(process: subprocess.Popen[str], file: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not file.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def finish(words: list[str]) -> str:
    process = start(words)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stderr
    return stderr


def test_killed_and_resumed(model: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "words.txt")
    kill_after(start(command(model, text, "killed")), Path("killed.work/site-001.json"))
    assert not Path("killed").exists()
    done = len(list(Path("killed.work").glob("site-*.json")))
    assert 2 <= done < LAYERS, "killed too late to say anything"

    other = start(command(model, text, "killed", "--seed", "1"))
    _, refusal = other.communicate(timeout=PATIENCE)
    assert other.returncode == 2 and "seed was 0, is 1" in refusal  # another run's work is not taken over

    stderr = finish(command(model, text, "killed"))
    assert f"resuming: {done} FFNs are done" in stderr and not Path("killed.work").exists()
    assert "resuming" not in finish(command(model, text, "whole"))
    assert sha256("killed/model.factormix.safetensors") == sha256("whole/model.factormix.safetensors")
    assert not list(tmp_path.glob(".*"))  # no temporary folder either


def test_overwrite_resumes_its_own_work(model: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "words.txt")
    Path("out").mkdir()
    Path("out/old.txt").write_text("old", encoding="utf-8")
    words = command(model, text, "out", "--overwrite")
    kill_after(start(words), Path("out.work/site-000.json"))
    assert Path("out/old.txt").read_text(encoding="utf-8") == "old"
    assert "resuming" in finish(words)
    assert Path("out/model.factormix.safetensors").is_file() and not Path("out/old.txt").exists()
