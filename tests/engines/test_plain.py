"""Plain transformers, in an environment without FactorMix: the logits and greedy tokens of FactorMix's own model."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from factormix.export import export_model
from tests.engines.engine import (
    NEW_TOKENS,
    ask,
    assert_same_until_a_near_tie,
    logits_of,
    named_model,
    prompts_of,
    python_of,
    text_of,
)
from tests.export.test_gguf_file import bytes_tokenizer
from tests.export.tiny import difference, factored, typical, windows

LAYOUTS = {"llama": "S1A2E4", "mistral": "S1A2E4", "qwen2": "S1A2E4", "qwen3": "S1A2E4", "olmo2": "S0A2E4"}
CONTEXT = {"max_position_embeddings": 256}


@dataclass(frozen=True)
class Case:
    """A model here, and what plain transformers said of its export."""

    model: PreTrainedModel
    prompts: list[list[int]]
    text: list[int]
    tokens: list[list[int]]
    logits: torch.Tensor  # (L, V)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """All models in one process of the clean environment."""
    python_of("plain")
    folder = tmp_path_factory.mktemp("plain")
    models = {family: (factored(family, layout, **CONTEXT), bytes_tokenizer()) for family, layout in LAYOUTS.items()}
    if named := named_model():
        models["named"] = named
    asked = []
    for name, (model, tokenizer) in models.items():
        export_model(model, folder / name, windows(), tokenizer, quiet=True)
        asked.append({"prompts": prompts_of(model, tokenizer), "text": text_of(model, tokenizer)})
    file = folder / "logits.safetensors"
    answer = ask("plain", file, *(folder / name for name in models), models=asked, new_tokens=NEW_TOKENS)
    logits = load_file(file)
    return {
        name: Case(models[name][0], **wanted, tokens=answer["tokens"][number], logits=logits[str(number)])
        for number, (name, wanted) in enumerate(zip(models, asked))
    }


@pytest.mark.parametrize("name", [*LAYOUTS, "named"])
def test_plain_transformers(name: str, cases: dict[str, Case]) -> None:
    if name not in cases:
        pytest.skip("FACTORMIX_ENGINE_MODEL names no model")
    case = cases[name]
    own = logits_of(case.model, case.text)
    print(
        f"{name}: logits {difference(case.logits, own):.2e} apart, the median token's {typical(case.logits, own):.2e}"
    )
    assert typical(case.logits, own) < 1e-3
    for prompt, said in zip(case.prompts, case.tokens):
        assert_same_until_a_near_tie(case.model, prompt, said)
