"""What the tests of engines share: models, prompts, the engine's process, greedy tokens held against a model's logits.

Tiny random models by default; FACTORMIX_ENGINE_MODEL names a factored model to try instead.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import factormix

HERE = Path(__file__).parent
TEXT = (HERE.parents[1] / "README.md").read_text(encoding="utf-8")
NEW_TOKENS, TEXT_TOKENS = 64, 128
NEAR_TIE = 0.05  # nats between the two first tokens: engines add in another order
PROMPTS = ("The capital of France is", "Once upon a time there was a", "The committee met on Monday and")
LEGAL = {"hidden_size": 64, "intermediate_size": 512, "head_dim": 16, "max_position_embeddings": 256}
"""Sizes that llama.cpp takes: whole blocks of 32 in an expert and a row."""


def python_of(engine: str) -> str:
    """The interpreter of an engine's environment, or skip."""
    found = os.environ.get(f"FACTORMIX_{engine.upper()}_PYTHON")
    if not found:
        pytest.skip(f"{engine} is not installed; `make test-engines` installs it and runs this")
    return found


def ask(engine: str, *arguments: str | Path, **request: Any) -> dict[str, Any]:
    """Run an engine's script in its environment; what it writes is JSON."""
    command = [python_of(engine), HERE / f"{engine}_script.py", *arguments]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, input=json.dumps(request).encode(), capture_output=True, timeout=1800, env=alone)
    if done.returncode:
        lines = done.stderr.decode().splitlines()
        said = [line for line in lines if "Error" in line]  # vLLM says much else
        raise AssertionError("\n".join([*said, *lines[-20:]]))
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def named_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase] | None:
    """The model that FACTORMIX_ENGINE_MODEL names, in float32, with its tokenizer."""
    if not (named := os.environ.get("FACTORMIX_ENGINE_MODEL")):
        return None
    return factormix.load(named, dtype=torch.float32), AutoTokenizer.from_pretrained(named)


def prompts_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Three prompts: of text, or of random tokens for a tiny model."""
    if os.environ.get("FACTORMIX_ENGINE_MODEL"):
        return [tokenizer(text)["input_ids"] for text in PROMPTS]
    return torch.randint(10, model.config.vocab_size, (3, 12), generator=torch.Generator().manual_seed(0)).tolist()


def text_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """TEXT_TOKENS tokens: FactorMix's README, or random ones for a tiny model."""
    if os.environ.get("FACTORMIX_ENGINE_MODEL"):
        return tokenizer(TEXT)["input_ids"][:TEXT_TOKENS]  # type: ignore[no-any-return]
    generator = torch.Generator().manual_seed(1)
    return torch.randint(10, model.config.vocab_size, (TEXT_TOKENS // 2,), generator=generator).tolist()


@torch.inference_mode()
def logits_of(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """(L, V) of one window."""
    return model(input_ids=torch.tensor([ids])).logits[0]


def perplexity_of(model: PreTrainedModel, ids: list[int]) -> float:
    """Of the tokens after the first."""
    nll = torch.nn.functional.cross_entropy(logits_of(model, ids)[:-1], torch.tensor(ids[1:]))
    return float(nll.exp())


def assert_same_until_a_near_tie(
    model: PreTrainedModel, prompt: list[int], said: list[int], never: int | None = None
) -> None:
    """Greedy tokens equal to the model's; the first that differs was nearly as likely.

    Args:
        model: whose logits count.
        prompt, said: tokens.
        never: a token that the engine was told not to say.
    """
    assert len(said) == NEW_TOKENS
    logits = logits_of(model, [*prompt, *said])[len(prompt) - 1 : -1].clone()  # (N, V)
    if never is not None:
        logits[:, never] = -torch.inf
    differ = (logits.argmax(-1) != torch.tensor(said)).nonzero()[:, 0]
    if not len(differ):
        return
    first, row = int(differ[0]), logits[differ[0]]
    gap = float(row.max() - row[said[first]])
    print(f"first divergence at token {first}: {said[first]}, not {int(row.argmax())}; {gap:.4f} nats apart")
    assert gap < NEAR_TIE, f"token {first}: {said[first]}, not {int(row.argmax())}"
