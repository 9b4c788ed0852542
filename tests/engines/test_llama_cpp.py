"""llama.cpp runs every kind of .gguf file that is written, to transformers' greedy tokens and perplexity."""

from __future__ import annotations

from pathlib import Path

import pytest

from factormix.export import export_model
from tests.engines.engine import (
    LEGAL,
    NEW_TOKENS,
    ask,
    assert_same_until_a_near_tie,
    named_model,
    perplexity_of,
    prompts_of,
    python_of,
    text_of,
)
from tests.export.test_gguf_file import bytes_tokenizer
from tests.export.tiny import factored, windows

LAYOUTS = {  # container -> family, layout, head size: what `--to gguf` writes as it
    "granite": ("llama", "S4A2E8", 16),
    "mixtral": ("llama", "S0A2E8", 32),
    "qwen2_moe": ("qwen2", "S4A2E8", 16),
    "qwen3_moe": ("qwen3", "S0A2E8", 32),
    "glm4_moe": ("qwen3", "S4A2E8", 32),
}


@pytest.mark.parametrize("quantization", ["f16", "q8_0"])
@pytest.mark.parametrize("container", LAYOUTS)
def test_llama_cpp(container: str, quantization: str, tmp_path: Path) -> None:
    python_of("llama")
    if (named := named_model()) and container != "granite":
        pytest.skip("FACTORMIX_ENGINE_MODEL names one model")
    family, layout, head = LAYOUTS[container]
    model, tokenizer = named or (factored(family, layout, **{**LEGAL, "head_dim": head}), bytes_tokenizer())
    result = export_model(
        model, tmp_path / "out", windows(), tokenizer, "gguf", [quantization], bool(named), quiet=True
    )  # fmt: skip
    assert named or result.choice.container.name == container
    prompts, text = prompts_of(model, tokenizer), text_of(model, tokenizer)
    file = tmp_path / "out" / result.gguf[0]
    answer = ask("llama", file, prompts=prompts, new_tokens=NEW_TOKENS, text=text)
    ours = perplexity_of(model, text)
    print(f"{container} {quantization}: perplexity {answer['perplexity']:.3f}, FactorMix {ours:.3f}")
    rough = 0.05 if quantization == "q8_0" and not named else 0.01  # eight bits of 64 numbers average little
    assert answer["perplexity"] == pytest.approx(ours, rel=rough)
    if quantization == "f16":  # eight bits are another model, whose greedy tokens soon differ
        for prompt, said in zip(prompts, answer["tokens"]):
            assert_same_until_a_near_tie(model, prompt, said, never=tokenizer.eos_token_id)
