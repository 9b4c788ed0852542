"""What the model says: the greedy answer to one prompt, the same way for dense and sparse."""

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

    Sampling, penalties and other habits of the model's own generation config are left out, so that two models answer
    by the same rule; its end-of-sequence tokens are kept.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompt: what to answer or continue.
        max_new_tokens: at most so many tokens; 1 or more.
        chat: put the prompt in the tokenizer's chat template, where it has one, as a user's message.

    Raises:
        FactorMixError: a model that does not generate, an empty prompt.
    """
    if not getattr(model, "can_generate", lambda: False)():
        raise FactorMixError(f"{type(model).__name__} does not generate text. {REMEDY}")
    if max_new_tokens < 1:
        raise FactorMixError(f"max_new_tokens received {max_new_tokens}; allowed: at least 1.")
    ids = _encode(tokenizer, prompt, chat).to(next(model.parameters()).device)  # (1, P)
    stop = end_tokens(model, tokenizer)
    out = continued(model, tokenizer, ids, torch.ones_like(ids), max_new_tokens, do_sample=False)
    said = out[0, ids.shape[1] :].tolist()
    if said and said[-1] in stop:  # the model's own end need not be special to the tokenizer
        said.pop()
    return str(tokenizer.decode(said, skip_special_tokens=True))


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Tensor:
    """Token ids (1, P)."""
    if not prompt.strip():
        raise FactorMixError("the prompt is empty: give some text to answer.")
    if chat and getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written them
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise FactorMixError(f"the prompt {prompt!r} gives no tokens with this tokenizer.")
    return torch.tensor([ids], dtype=torch.long)
