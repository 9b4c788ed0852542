"""generate() by a rule of our own alone, and the tokens at which a text ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>")  # of a chat model, whose end of sequence may end a turn only


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Every token that ends an answer, a turn or a document: for the model, for its tokenizer, or by its name."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = configured if isinstance(configured, list | tuple) else [configured]
    found = {*ends, tokenizer.eos_token_id, *_named_ends(tokenizer)} - {None}
    return sorted(int(end) for end in found)


def document_start(tokenizer: Any) -> list[int]:
    """The special tokens before a document's first word: the tokenizer's own, else what ends the document before.

    Empty where the tokenizer has neither.
    """
    last = tokenizer.eos_token_id
    ends = _named_ends(tokenizer) or ([] if last is None else [last])
    return list(tokenizer("")["input_ids"]) or ends[:1]


def _named_ends(tokenizer: Any) -> list[int]:
    known = tokenizer.get_vocab()
    return [known[word] for word in DOCUMENT_ENDS if word in known]


def padding(tokenizer: Any, ends: list[int]) -> int:
    """What fills a row up: the tokenizer's own, else one of `ends`."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return ends[0] if ends else 0


def continued(
    model: PreTrainedModel, tokenizer: Any, ids: Tensor, mask: Tensor, max_new_tokens: int, **choice: Any
) -> Tensor:
    """Prompts ids (N, P) under mask (N, P) and what the model says up to an end, (N, P + M); it is left as it was.

    `choice` is how a token is chosen, in GenerationConfig's words. Of the model's own generation config only the
    end-of-sequence tokens count.
    """
    ends = end_tokens(model, tokenizer)
    rule = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens, num_beams=1, repetition_penalty=1.0,
        eos_token_id=ends or None, pad_token_id=padding(tokenizer, ends), **choice,
    )  # fmt: skip
    own, was_training = model.generation_config, model.training
    model.train(False)
    # generate() fills what `rule` leaves open from the model's own
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        with torch.inference_mode():
            return model.generate(  # type: ignore[operator, no-any-return]
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=rule
            )
    finally:
        model.generation_config = own
        model.train(was_training)
