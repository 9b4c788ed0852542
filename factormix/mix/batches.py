"""Make the micro-batches of stage 1: knowledge, and beside it windows of general text for the old-knowledge loss.

Unstructured knowledge is packed into windows. Structured knowledge is ``{"prompt": "Paris is the capital of {} .",
"targets": ["France"]}`` and gives one row for each target. Rows of about one window together make a micro-batch, padded
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
    """The `factormix.train.Batches` for `InjectionLoss`, whose argument `batch` explains the keys.

    Args:
        windows: unstructured knowledge, or None.
        facts: padded rows of structured knowledge, from `fact_rows`.
        general: windows of general text.
        tokens: tokens of one micro-batch.
        length: micro-batches of the whole run. If the knowledge has fewer, it repeats, each time beside other general
            text.
        old_every: every Nth micro-batch has general text beside it, and its L_S counts N times; this is N.

    Attributes:
        distinct: number of different micro-batches of knowledge.
        beside: for each micro-batch that has general text, the number of its window. By default the windows follow in
            their own order, which is random by document. Another choice can be assigned here.
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
        """A micro-batch without general text beside it."""
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
    """Read, tokenise and pack knowledge and general text for `inject`.

    Args:
        knowledge: files of knowledge, structured or not, or `Documents`.
        general: files or documents of general text.
        tokenizer: the model's tokenizer.
        window: L, the tokens of a window of either text.
        tokens: tokens of knowledge in the whole run. More text is not tokenised, and less text is repeated.
        seed: seed of the order of documents.
        general_tokens: the most tokens of general text that are packed. By default as many as L_S needs.
        old_every: every Nth micro-batch has general text beside it; this is N.

    Returns:
        The micro-batches. Each is a dict with "input_ids", "attention_mask" (B, L) int64, "counted" (B, L) bool and
        "structured" () bool; those with general text also have the keys that `InjectionLoss` names.

    Raises:
        FactorMixError: `read_documents` or `pack` refuses a text, or a fact has no object tokens or does not fit into
            a window.
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
    """Put facts in random order into micro-batches, as many in each as fit into a window with their padding.

    Each micro-batch has "input_ids", "attention_mask" (B, L) int64, "counted" (B, L) bool and "structured" () True.
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
    """Pack at most `tokens` tokens, but at least one window. A shorter text gives all its whole windows."""
    return pack(texts, tokenizer, window, max(tokens, window), seed, wants_bos(tokenizer), at_most=True)


def window_batch(packed: Packed, index: int) -> dict[str, Tensor]:
    """A window of plain text as a micro-batch of one row: every tensor is (1, L), except "structured" ()."""
    row = slice(index, index + 1)
    ids = packed.input_ids[row]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "counted": packed.scored[row],
        "structured": torch.tensor(False),
    }
