"""Micro-batches of stage 1: knowledge, and beside each a window of general text for the old-knowledge loss.

Unstructured knowledge is packed into windows. Structured knowledge, ``{"prompt": "Paris is the capital of {} .",
"targets": ["France"]}``, becomes one row for each target; rows of about one window together make a micro-batch, padded
on the right. Both kinds may be mixed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from factormix.data.facts import Fact, fact_of, padded
from factormix.data.packing import Packed, pack, wants_bos
from factormix.data.text import Documents, read_documents


class Stage1Batches:
    """`factormix.train.Batches` of `InjectionLoss`; see its argument `batch` for the keys.

    Args:
        windows: unstructured knowledge, or None.
        facts: padded rows of structured knowledge, as `fact_rows` makes them.
        general: windows of general text.
        tokens: of one micro-batch.
        length: micro-batches of the whole run; where it is more than there are different ones of knowledge, these
            repeat, each time beside other general text.
        old_every: one micro-batch in so many has general text beside it, and its L_S counts so many times.

    Attributes:
        distinct: micro-batches of knowledge that differ.
        beside: the general window, by number, of each micro-batch that has one beside it: one after the other, of
            documents in random order, unless something else is put here.
    """

    def __init__(
        self,
        windows: Packed | None,
        facts: Sequence[dict[str, Tensor]],
        general: Packed,
        tokens: int,
        length: int = 0,
        old_every: int = 1,
    ) -> None:
        self.windows, self.facts, self.general, self.tokens = windows, facts, general, tokens
        self._texts = 0 if windows is None else len(windows)
        self.distinct = self._texts + len(self.facts)
        self.length, self.old_every = max(length, self.distinct), old_every
        self.beside = [i % len(general) for i in range(-(-self.length // old_every))]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index % self.old_every:
            return self.knowledge(index)
        row = self.beside[index // self.old_every]
        ids = self.general.input_ids[row : row + 1]  # (1, L')
        general = {"general_ids": ids, "general_mask": torch.ones_like(ids)}
        return {**self.knowledge(index), **general, "old_weight": torch.tensor(float(self.old_every))}

    def knowledge(self, index: int) -> dict[str, Tensor]:
        """A micro-batch without the general text beside it."""
        index %= self.distinct
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
    old_every: int = 4,
) -> Stage1Batches:
    """Read, tokenise and pack both texts.

    Args:
        knowledge: files, structured or not, or `Documents`.
        general: files or documents of general text.
        tokenizer: the model's.
        window: L, of both.
        tokens: of the run; text beyond is not tokenised, less is read again.
        seed: of the order of documents.
        general_tokens: most tokens of general text that are packed; by default what L_S needs.
        old_every: one micro-batch in so many has general text beside it.

    Raises:
        FactorMixError: as `read_documents` and `pack`; a fact without object tokens or longer than a window.
    """
    parts = [part if isinstance(part, Documents) else read_documents(part) for part in knowledge]
    texts = [text for part in parts if part.kind != "knowledge" for text in part.plain(tokenizer)]
    records = [record for part in parts if part.kind == "knowledge" for record in part.records]
    windows = pack_some(texts, tokenizer, window, tokens, seed) if texts else None
    facts = [fact_of(r["prompt"], target, tokenizer, window) for r in records for target in r["targets"]]
    rows = fact_rows(facts, window, tokenizer.pad_token_id or 0, seed)
    retained = read_documents(general).plain(tokenizer)
    packed = pack_some(retained, tokenizer, window, general_tokens or tokens // old_every, seed + 1)
    return Stage1Batches(windows, rows, packed, window, tokens // window, old_every)


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
    return [padded(group, pad) for group in groups]


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
