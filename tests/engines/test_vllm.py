"""vLLM serves an exported directory by its OpenAI-compatible server, to transformers' greedy tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from factormix.export import export_model
from tests.engines.engine import (
    LEGAL,
    NEW_TOKENS,
    ask,
    assert_same_until_a_near_tie,
    named_model,
    prompts_of,
    python_of,
)
from tests.export.test_gguf_file import bytes_tokenizer
from tests.export.tiny import factored, windows

SIZES = {**LEGAL, "hidden_size": 128, "head_dim": 32}  # its attention on CPUs has no smaller heads
LAYOUTS = {  # container -> family, layout
    "granite": ("llama", "S4A2E8"),
    "mixtral": ("mistral", "S0A2E8"),
    "qwen2_moe": ("qwen2", "S4A2E8"),
    "qwen3_moe": ("qwen3", "S0A2E8"),
    "glm4_moe": ("qwen3", "S4A2E8"),
    "flex_olmo": ("olmo2", "S0A2E8"),
}


@pytest.mark.parametrize("container", LAYOUTS)
def test_vllm(container: str, tmp_path: Path) -> None:
    python_of("vllm")
    if (named := named_model()) and container != "granite":
        pytest.skip("FACTORMIX_ENGINE_MODEL names one model")
    family, layout = LAYOUTS[container]
    model, tokenizer = named or (factored(family, layout, **SIZES), bytes_tokenizer())
    export_model(model, tmp_path / "out", windows(), tokenizer, "auto" if named else container, quiet=True)
    prompts = prompts_of(model, tokenizer)
    answer = ask("vllm", tmp_path / "out", prompts=prompts, new_tokens=NEW_TOKENS)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for prompt, said in zip(prompts, answer["tokens"]):
        assert_same_until_a_near_tie(stock, prompt, said)
