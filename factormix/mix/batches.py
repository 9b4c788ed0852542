"""Micro-batches of stage 1: knowledge, and beside each a window of general text for the old-knowledge loss.

Unstructured knowledge is packed into windows. Structured knowledge, ``{"prompt": "Paris is the capital of {} .",
"targets": ["France"]}``, becomes one row for each target; rows of about one window together make a micro-batch, padded
on the right. Both kinds may be mixed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from factormix.data.packing import Packed, pack, wants_bos
from factormix.data.text import Documents, read_documents
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


class Stage1Batches:
    """`factormix.train.Batches` of `InjectionLoss`; see its argument `batch` for the keys.

    Args:
        windows: unstructured knowledge, or None.
        facts: padded rows of structured knowledge, as `fact_rows` makes them.
        general: windows of general text.
        tokens: of one micro-batch.

    Attributes:
        beside: the general window of each micro-batch, by number: at random (window i, or i modulo their number, of
            documents in random order) unless something else is put here.
    """

    def __init__(
        self, windows: Packed | None, facts: Sequence[dict[str, Tensor]], general: Packed, tokens: int
    ) -> None:
        self.windows, self.facts, self.general, self.tokens = windows, facts, general, tokens
        self._texts = 0 if windows is None else len(windows)
        self.beside = [i % len(general) for i in range(len(self))]

    def __len__(self) -> int:
        return self._texts + len(self.facts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.beside[index]
        ids = self.general.input_ids[row : row + 1]  # (1, L')
        return {**self.knowledge(index), "general_ids": ids, "general_mask": torch.ones_like(ids)}

    def knowledge(self, index: int) -> dict[str, Tensor]:
        """A micro-batch without the general text beside it."""
        if self.windows is not None and index < self._texts:
            return window_batch(self.windows, index)
        return dict(self.facts[index - self._texts])


def stage1_batches(
    knowledge: Sequence[Documents | str | Path],
    general: Documents | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int,
    tokens: int,
    seed: int,
    general_tokens: int | None = None,
) -> Stage1Batches:
    """Read, tokenise and pack both texts.

    Args:
        knowledge: files, structured or not, or `Documents`.
        general: files or documents of general text.
        tokenizer: the model's.
        window: L, of both.
        tokens: most tokens of unstructured knowledge that are packed; text beyond is not tokenised.
        seed: of the order of documents.
        general_tokens: most tokens of general text that are packed; by default as many as of knowledge.

    Raises:
        FactorMixError: as `read_documents` and `pack`; a fact without object tokens or longer than a window.
    """
    parts = [part if isinstance(part, Documents) else read_documents(part) for part in knowledge]
    texts = [text for part in parts if part.kind != "knowledge" for text in part.texts]
    records = [record for part in parts if part.kind == "knowledge" for record in part.records]
    windows = pack_some(texts, tokenizer, window, tokens, seed) if texts else None
    facts = [fact_of(r["prompt"], target, tokenizer, window) for r in records for target in r["targets"]]
    rows = fact_rows(facts, window, tokenizer.pad_token_id or 0, seed)
    packed = pack_some(read_documents(general).texts, tokenizer, window, general_tokens or tokens, seed + 1)
    return Stage1Batches(windows, rows, packed, window)


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


def fact_rows(facts: Sequence[Fact], window: int, pad: int, seed: int) -> list[dict[str, Tensor]]:
    """Facts in random order, as many to a micro-batch as fit a window with their padding.

    Each batch: "input_ids", "attention_mask" (B, L) int64, "counted" (B, L) bool, "structured" () True.
    """
    order = list(facts)
    random.Random(seed).shuffle(order)
    groups: list[list[Fact]] = []
    longest = 0
    for fact in order:
        longest = max(longest, len(fact.ids))
        if not groups or (len(groups[-1]) + 1) * longest > window:
            groups.append([])
            longest = len(fact.ids)
        groups[-1].append(fact)
    return [_padded(group, pad) for group in groups]


def _padded(group: Sequence[Fact], pad: int) -> dict[str, Tensor]:
    length = max(len(fact.ids) for fact in group)
    missing = [length - len(fact.ids) for fact in group]
    return {
        "input_ids": torch.tensor([fact.ids + [pad] * m for fact, m in zip(group, missing)]),  # (B, L)
        "attention_mask": torch.tensor([[1] * len(fact.ids) + [0] * m for fact, m in zip(group, missing)]),
        "counted": torch.tensor([fact.counted + [False] * m for fact, m in zip(group, missing)]),
        "structured": torch.tensor(True),
    }


def pack_some(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, window: int, tokens: int, seed: int) -> Packed:
    """At most `tokens` tokens and at least a window; all whole windows of a text that has fewer, which then repeats."""
    return pack(texts, tokenizer, window, max(tokens, window), seed, wants_bos(tokenizer), at_most=True)


def window_batch(packed: Packed, index: int) -> dict[str, Tensor]:
    """A window of plain text as a micro-batch of one row, all (1, L) but "structured" ()."""
    row = slice(index, index + 1)
    ids = packed.input_ids[row]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "counted": packed.scored[row],
        "structured": torch.tensor(False),
    }
