"""Decode the greedy answer to one prompt, in the same way for dense and sparse models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from factormix.data.generation import continued, end_tokens
from factormix.evaluate.causal import REMEDY
from factormix.run.errors import FactorMixError


def answer(model: PreTrainedModel, tokenizer: Any, prompt: str, max_new_tokens: int = 64, chat: bool = True) -> str:
    """The continuation of `prompt` by greedy decoding, without special tokens and otherwise unedited.

    The model's own generation config is not used, except for its end-of-sequence tokens. So there is no sampling and no
    penalty, and two models answer by the same rule.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompt: the text to answer or continue.
        max_new_tokens: the most tokens of the answer, at least 1.
        chat: put the prompt as a user's message into the tokenizer's chat template, if it has one.

    Raises:
        FactorMixError: the model does not generate, the prompt is empty or gives no token, or `max_new_tokens` is
            below 1.
    """
    if not getattr(model, "can_generate", lambda: False)():
        raise FactorMixError(f"{type(model).__name__} does not generate text. {REMEDY}")
    if max_new_tokens < 1:
        raise FactorMixError(f"max_new_tokens received {max_new_tokens}; allowed: at least 1.")
    ids = _encode(tokenizer, prompt, chat).to(next(model.parameters()).device)  # (1, P)
    stop = end_tokens(model, tokenizer)
    out = continued(model, tokenizer, ids, torch.ones_like(ids), max_new_tokens, do_sample=False)
    new_ids = out[0, ids.shape[1] :].tolist()
    if new_ids and new_ids[-1] in stop:  # the tokenizer need not know the model's end token as a special one
        new_ids.pop()
    return str(tokenizer.decode(new_ids, skip_special_tokens=True))


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Tensor:
    """Token ids (1, P)."""
    if not prompt.strip():
        raise FactorMixError("the prompt is empty: give some text to answer.")
    if chat and getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template adds the special tokens
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise FactorMixError(f"the prompt {prompt!r} gives no tokens with this tokenizer.")
    return torch.tensor([ids], dtype=torch.long)
