"""Structured knowledge, ``{"prompt": "Paris is the capital of {} .", "targets": ["France"]}``, as rows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from factormix.run.errors import FactorMixError


@dataclass(frozen=True)
class Fact:
    """One sentence of structured knowledge.

    Attributes:
        ids: its tokens, with what the tokenizer puts around a text.
        counted: True for the tokens of the object.
    """

    ids: list[int]
    counted: list[bool]


def fact_of(prompt: str, target: str, tokenizer: PreTrainedTokenizerBase, window: int) -> Fact:
    """The prompt with its object in place of ``{}`` (or after it), and which tokens are the object's.

    Raises:
        FactorMixError: a slow tokenizer, which cannot say where a token lies in the text; a fact that is too long.
    """
    if not tokenizer.is_fast:
        raise FactorMixError(
            f"structured knowledge needs a fast tokenizer, to find the object's tokens; {type(tokenizer).__name__} is "
            "slow. Write the knowledge as plain text instead."
        )
    before, found, after = prompt.partition("{}")
    before = before if found else f"{prompt} "
    start, end = len(before), len(before) + len(target)
    coded = tokenizer(before + target + after, return_offsets_mapping=True)
    ids, offsets = list(coded["input_ids"]), coded["offset_mapping"]
    counted = [a < end and b > start and b > a for a, b in offsets]  # special tokens have a == b
    if tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id] and tokenizer.cls_token_id is None:
        ids, counted = [tokenizer.bos_token_id, *ids], [False, *counted]  # as windows begin
    if not any(counted) or len(ids) > window:
        why = (
            f"is {len(ids)} tokens, more than a window of {window}"
            if len(ids) > window
            else "gives its object no token"
        )
        raise FactorMixError(f"structured knowledge {before + target + after!r} {why}.")
    return Fact(ids, counted)


def padded(group: Sequence[Fact], pad: int) -> dict[str, Tensor]:
    """Facts as rows of one length, padded on the right: see `factormix.mix.batches.fact_rows`."""
    length = max(len(fact.ids) for fact in group)
    missing = [length - len(fact.ids) for fact in group]
    return {
        "input_ids": torch.tensor([fact.ids + [pad] * m for fact, m in zip(group, missing)]),  # (B, L)
        "attention_mask": torch.tensor([[1] * len(fact.ids) + [0] * m for fact, m in zip(group, missing)]),
        "counted": torch.tensor([fact.counted + [False] * m for fact, m in zip(group, missing)]),
        "structured": torch.tensor(True),
    }
