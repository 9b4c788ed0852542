"""Text in a model's own words: something to calibrate, heal or retain on where there is no text at hand.

    rows = own_words(model, tokenizer, count=32, kind="chat", seed=0)      # [{"messages": [...]}, ...]

A chat model is given the opening of a user's turn, writes the turn, and then answers it (Magpie, arXiv 2406.08464). A
document begins at the end-of-text token (data-free distillation: LLM-QAT, arXiv 2305.17888). Both are drawn token by
token from the model's distribution, so the text is of the kinds that the model knows, right or wrong: a teacher for how
it speaks, not a source of facts.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from factormix.data.generation import continued, document_start, end_tokens, padding
from factormix.run.errors import FactorMixError

OwnKind = Literal["chat", "text"]
TEMPERATURE = 0.9
QUESTION_TOKENS = 64  # of a user's turn, at most; one that does not end by then is dropped
SHORTEST = 12  # characters of a turn or a document


def own_words(
    model: PreTrainedModel, tokenizer: Any, count: int, *, kind: OwnKind, max_new_tokens: int = 256, seed: int = 0
) -> list[dict[str, Any]]:
    """Chats or documents, as lines of a .jsonl file hold them.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer; with a template for chats, with an end-of-sequence token for documents.
        count: how many are begun, all at once; those that come to nothing are left out.
        kind: "chat" or "text".
        max_new_tokens: of an answer or a document.
        seed: of the draws.

    Raises:
        FactorMixError: a model that does not generate, a tokenizer without what the kind needs.
    """
    if not model.can_generate():  # type: ignore[no-untyped-call]
        raise FactorMixError(f"{type(model).__name__} does not generate text; give a causal language model.")
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        if kind == "text":
            return _documents(model, tokenizer, count, max_new_tokens)
        return _chats(model, tokenizer, count, max_new_tokens)


def _documents(model: PreTrainedModel, tokenizer: Any, count: int, length: int) -> list[dict[str, Any]]:
    start = document_start(tokenizer)
    if not start:
        raise FactorMixError(
            f"{type(tokenizer).__name__} of this model has no special token with which a document begins; sample chats."
        )
    ids = torch.tensor([start] * count)  # (N, P)
    rows = _draw(model, tokenizer, ids, torch.ones_like(ids), length)
    texts = (tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows)
    return [{"text": text} for text in texts if len(text) >= SHORTEST]


def _chats(model: PreTrainedModel, tokenizer: Any, count: int, length: int) -> list[dict[str, Any]]:
    if not tokenizer.chat_template:
        raise FactorMixError(f"{type(tokenizer).__name__} of this model has no chat template; sample kind text.")
    start = torch.tensor([_opening(tokenizer)] * count)  # (N, P)
    turns = _draw(model, tokenizer, start, torch.ones_like(start), QUESTION_TOKENS, whole=True)
    questions = [tokenizer.decode(turn, skip_special_tokens=True).strip() for turn in turns]
    questions = [question for question in questions if len(question) >= SHORTEST]
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": said}]}
        for question, said in zip(questions, drawn_answers(model, tokenizer, questions, length), strict=True)
        if said
    ]


def drawn_answers(model: PreTrainedModel, tokenizer: Any, questions: list[str], max_new_tokens: int) -> list[str]:
    """An answer to each question, all drawn at once; "" where the model ended before a word."""
    if not questions:
        return []
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=True, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for question in questions
    ]
    longest, pad = max(map(len, prompts)), padding(tokenizer, end_tokens(model, tokenizer))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])  # (N, P), padded on the left
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    rows = _draw(model, tokenizer, ids, mask, max_new_tokens)
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]


def _opening(tokenizer: Any) -> list[int]:
    """What the template puts before a user's first words."""
    marker = "\N{REPLACEMENT CHARACTER}here\N{REPLACEMENT CHARACTER}"
    whole = tokenizer.apply_chat_template([{"role": "user", "content": marker}], tokenize=False)
    return list(tokenizer(whole.split(marker)[0], add_special_tokens=False)["input_ids"])


def _draw(
    model: PreTrainedModel, tokenizer: Any, ids: Tensor, mask: Tensor, length: int, *, whole: bool = False
) -> list[list[int]]:
    """What follows each row of ids (N, P), up to its end; `whole` leaves out rows that do not end."""
    ends = end_tokens(model, tokenizer)
    how = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "top_p": 1.0}
    out = continued(model, tokenizer, ids, mask, length, **how)
    rows = []
    for row in out[:, ids.shape[1] :].tolist():
        stops = [place for place, token in enumerate(row) if token in ends]
        if stops or not whole:
            rows.append(row[: stops[0]] if stops else row)
    return rows
