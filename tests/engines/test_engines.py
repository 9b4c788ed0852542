"""The engines themselves, where `make test-engines` has installed them: the same greedy tokens as transformers.

A tiny random model by default; FACTORMIX_ENGINE_MODEL names a factored model to try instead.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import factormix
from factormix.export import export_model
from tests.export.test_gguf_file import bytes_tokenizer
from tests.export.tiny import factored, windows

HERE = Path(__file__).parent
NEW_TOKENS, TEXT_TOKENS = 48, 128
NEAR_TIE = 0.05  # nats between the two first tokens: engines add in another order


def python_of(engine: str) -> str:
    """The interpreter of an engine's environment, or skip."""
    found = os.environ.get(f"FACTORMIX_{engine.upper()}_PYTHON")
    if not found:
        pytest.skip(f"{engine} is not installed; `make test-engines` installs it and runs this")
    return found


def ask(engine: str, script: str, model: Path, **request: Any) -> dict[str, Any]:
    """Run a script in an engine's environment; what it writes is JSON."""
    done = subprocess.run(
        [python_of(engine), HERE / script, model], input=json.dumps(request).encode(), capture_output=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def sparse() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if named := os.environ.get("FACTORMIX_ENGINE_MODEL"):
        from transformers import AutoTokenizer

        return factormix.load(named, dtype=torch.float32), AutoTokenizer.from_pretrained(named)
    size = {"hidden_size": 64, "intermediate_size": 512, "head_dim": 16, "max_position_embeddings": 256}
    return factored("llama", "S4A2E8", **size), bytes_tokenizer()


def prompts_of(model: PreTrainedModel) -> list[list[int]]:
    """Three prompts of random tokens below the vocabulary's end."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(10, min(1000, model.config.vocab_size), (3, 12), generator=generator).tolist()


def assert_same_until_a_near_tie(model: PreTrainedModel, prompt: list[int], said: list[int]) -> None:
    """Greedy tokens equal to the model's; the first that differs was nearly as likely."""
    ids = torch.tensor([[*prompt, *said]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]  # (N, V)
    for position, (row, token) in enumerate(zip(logits, said)):
        if int(row.argmax()) != token:
            best = row.topk(2).values
            assert float(best[0] - row[token]) < NEAR_TIE, f"token {position}: {token}, not {int(row.argmax())}"


def test_llama_cpp(sparse: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path) -> None:
    python_of("llama")
    model, tokenizer = sparse
    result = export_model(model, tmp_path / "out", windows(), tokenizer, to="gguf", quiet=True)
    text = prompts_of(model)[0] * 11
    answer = ask("llama", "llama_script.py", tmp_path / "out" / result.gguf[0], prompts=prompts_of(model),
                 new_tokens=NEW_TOKENS, text=text[:TEXT_TOKENS], vocabulary=model.config.vocab_size)  # fmt: skip
    for prompt, said in zip(prompts_of(model), answer["tokens"]):
        assert_same_until_a_near_tie(model, prompt, said)
    ids = torch.tensor([text[:TEXT_TOKENS]])
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:])
    assert answer["perplexity"] == pytest.approx(float(nll.exp()), rel=0.01)


def test_vllm(sparse: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path) -> None:
    python_of("vllm")
    model, tokenizer = sparse
    export_model(model, tmp_path / "out", windows(), tokenizer, quiet=True)
    answer = ask("vllm", "vllm_script.py", tmp_path / "out", prompts=prompts_of(model), new_tokens=NEW_TOKENS)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for prompt, said in zip(prompts_of(model), answer["tokens"]):
        assert_same_until_a_near_tie(stock, prompt, said)
