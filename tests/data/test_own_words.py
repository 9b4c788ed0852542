"""Text that a model writes by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from factormix.data.generation import document_start, end_tokens
from factormix.data.own_words import QUESTION_TOKENS, drawn_answers, own_words
from factormix.evaluate.answers import answer
from factormix.run.errors import FactorMixError
from tests.cli.tiny import save_tiny
from tests.families import tiny_model

TEMPLATE = (
    "{% for m in messages %}w5 {{ m['content'] }} {% if m['role'] == 'user' %}w6 {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w7{% endif %}"
)


@pytest.fixture
def speaker(tmp_path: Path) -> tuple[Any, Any]:
    folder = save_tiny("llama", tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    return AutoModelForCausalLM.from_pretrained(folder), tokenizer


def test_chats_are_questions_that_ended_and_their_answers(speaker: tuple[Any, Any]) -> None:
    model, tokenizer = speaker
    rows = own_words(model, tokenizer, 16, kind="chat", max_new_tokens=8, seed=3)
    assert 0 < len(rows) < 16  # a tiny random model does not end every question in time
    for row in rows:
        (user, question), (assistant, said) = ((m["role"], m["content"]) for m in row["messages"])
        assert (user, assistant) == ("user", "assistant")
        assert 0 < len(question.split()) < QUESTION_TOKENS and 0 < len(said.split()) <= 8
        assert "</s>" not in question + said
    assert rows == own_words(model, tokenizer, 16, kind="chat", max_new_tokens=8, seed=3)
    assert rows != own_words(model, tokenizer, 16, kind="chat", max_new_tokens=8, seed=4)


def test_an_answer_in_a_batch_is_the_models_own(speaker: tuple[Any, Any]) -> None:
    """With logits so large that drawing is choosing, answers to questions of unequal length are the greedy ones."""
    model, tokenizer = speaker
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    questions = ["w20", "w21 w22 w23 w24 w25", "w26 w27"]
    said = drawn_answers(model, tokenizer, questions, 6)
    assert said == [answer(model, tokenizer, question, 6).strip() for question in questions]
    assert len(set(said)) == 3


def test_documents_and_the_callers_randomness(speaker: tuple[Any, Any]) -> None:
    model, tokenizer = speaker
    own = model.generation_config
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    rows = own_words(model, tokenizer, 8, kind="text", max_new_tokens=12, seed=0)
    assert torch.equal(torch.rand(3), wanted) and model.generation_config is own
    assert rows and all(row.keys() == {"text"} and len(row["text"].split()) <= 12 for row in rows)


def test_a_turn_ends_where_the_models_own_config_says(speaker: tuple[Any, Any]) -> None:
    """Gemma's end of a turn stands in its generation config alone; no text reads on past it."""
    model, tokenizer = speaker
    before = own_words(model, tokenizer, 8, kind="text", max_new_tokens=24, seed=0)
    words = [row["text"].split() for row in before]
    stop = words[0][7]  # some document's eighth word
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(stop)]
    after = [row["text"].split() for row in own_words(model, tokenizer, 8, kind="text", max_new_tokens=24, seed=0)]
    assert all(stop not in row for row in after)
    assert words[0][: words[0].index(stop)] in after


def test_ends_and_starts(speaker: tuple[Any, Any]) -> None:
    model, tokenizer = speaker
    eos = tokenizer.eos_token_id
    model.generation_config.eos_token_id = None
    assert end_tokens(model, tokenizer) == [eos]
    assert document_start(tokenizer) == [eos]
    tokenizer.add_tokens(["<|endoftext|>"])  # a chat model's: the end of sequence ends its turns
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert document_start(tokenizer) == [end] and end_tokens(model, tokenizer) == sorted([eos, end])
    model.generation_config.eos_token_id = 7
    assert end_tokens(model, tokenizer) == sorted([7, eos, end])
    first = ("w1", tokenizer.convert_tokens_to_ids("w1"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="w1 $A", special_tokens=[first])
    assert document_start(tokenizer) == [first[1]]


def test_refuses(speaker: tuple[Any, Any]) -> None:
    model, tokenizer = speaker
    with pytest.raises(FactorMixError, match="does not generate"):
        own_words(tiny_model("bert"), tokenizer, 2, kind="text")
    tokenizer.chat_template = None
    with pytest.raises(FactorMixError, match="no chat template"):
        own_words(model, tokenizer, 2, kind="chat")
