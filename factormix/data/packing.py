"""Packing: many documents -> one stream of tokens -> windows of equal length, nothing padded.

Run it::

    packed = pack(documents.plain(tokenizer), tokenizer, window=512, tokens=16_384)
    packed.input_ids                  # (32, 512)
    packed.scored                     # (32, 512) True where the token is text

Documents are joined by the tokenizer's end-of-sequence token (by nothing when it has none), the stream is cut into
windows that do not overlap, and what the tokenizer itself puts around a text ([CLS] ... [SEP], Gemma's <bos>) is put
around every window.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from factormix.run.errors import FactorMixError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

CHARACTERS_PER_TOKEN = 8  # more than any tokenizer of English needs (4 to 5): one batch then usually suffices
BATCH_DOCUMENTS = 1000  # documents tokenised in one call, at most
BATCH_CHARACTERS = 1_000_000  # characters tokenised in one call, at most, unless one document is longer


@dataclass(frozen=True)
class Packed:
    """Windows of tokens.

    Attributes:
        input_ids: (N, L) int64.
        scored: (N, L) bool, True where the token is text. False on what the packing put there: BOS, CLS, SEP and
            the token that joins documents. An evaluation takes no loss for predicting those.
        tokens: N * L.
        sha256: of input_ids as little-endian int64, row by row.
    """

    input_ids: torch.Tensor
    scored: torch.Tensor
    tokens: int
    sha256: str

    @property
    def attention_mask(self) -> torch.Tensor:
        """(N, L) int64, all ones: windows hold no padding."""
        return torch.ones_like(self.input_ids)

    def __len__(self) -> int:
        return self.input_ids.shape[0]


def pack(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    window: int = 512,
    tokens: int | None = None,
    seed: int | None = None,
    bos: bool | None = None,
    at_most: bool = False,
) -> Packed:
    """Pack documents into windows.

    Args:
        texts: the documents.
        tokenizer: any Hugging Face tokenizer, fast or slow.
        window: L, tokens a window, special tokens included.
        tokens: how many tokens to return in all, rounded down to whole windows; no more text than that is
            tokenised. None: as many whole windows as the text fills.
        seed: shuffles the documents; None keeps their order.
        bos: True puts the tokenizer's BOS first in every window, False puts nothing there, None does what the
            tokenizer does by itself (Gemma: BOS, BERT: [CLS], SmolLM2: nothing).
        at_most: where the text has fewer than `tokens`, all its whole windows; by default that is an error.

    Raises:
        FactorMixError: too little text (with the numbers), a window that is too short or longer than the tokenizer
            says its model takes, or no BOS to put.
    """
    prefix, suffix = around(tokenizer, bos)
    inner = window - len(prefix) - len(suffix)
    limit = getattr(tokenizer, "model_max_length", None) or window
    if inner < 1:
        raise FactorMixError(
            f"window {window} leaves no room for text beside {len(prefix) + len(suffix)} special tokens; use more."
        )
    if window > limit:
        raise FactorMixError(f"window {window} is longer than the model's {limit} positions; use at most {limit}.")
    if tokens is not None and tokens < window:
        raise FactorMixError(
            f"tokens {tokens} is less than one window of {window}; ask for more or use a smaller window."
        )

    wanted = None if tokens is None else tokens // window * inner
    order = list(range(len(texts)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    ids, is_text = _stream([texts[i] for i in order], tokenizer, wanted)
    rows = len(ids) // inner
    least = inner if wanted is None or at_most else wanted
    if len(ids) < least:
        raise FactorMixError(
            f"too little text: {len(texts)} documents give {len(ids):,} tokens, {least:,} are needed "
            f"({least // inner} windows of {inner}). Give more text, or ask for fewer tokens or a smaller window."
        )
    body = torch.tensor(ids[: rows * inner], dtype=torch.int64).view(rows, inner)
    body_is_text = torch.tensor(is_text[: rows * inner], dtype=torch.bool).view(rows, inner)
    input_ids = torch.cat([_repeat(prefix, rows), body, _repeat(suffix, rows)], dim=1)  # (N, L)
    special = torch.zeros(rows, 1, dtype=torch.bool)
    scored = torch.cat(
        [special.expand(-1, len(prefix)), body_is_text, special.expand(-1, len(suffix))], dim=1
    )  # (N, L)
    digest = hashlib.sha256(input_ids.numpy().astype("<i8").tobytes()).hexdigest()
    return Packed(input_ids, scored, input_ids.numel(), digest)


def evenly(sources: Sequence[Sequence[str]], seed: int) -> list[str]:
    """The documents of several sources in one order that takes from all of them alike, until one runs out.

    Each source is shuffled by the seed; next comes always a document of the source of which the fewest characters were
    taken so far. So a budget of tokens is filled in equal parts, however long the sources are.
    """
    left = []
    for source in sources:
        order = list(range(len(source)))
        random.Random(seed).shuffle(order)
        left.append([source[i] for i in reversed(order)])
    taken, out = [0] * len(left), []
    while open_sources := [i for i, documents in enumerate(left) if documents]:
        fewest = min(open_sources, key=taken.__getitem__)
        out.append(left[fewest].pop())
        taken[fewest] += len(out[-1])
    return out


def wants_bos(tokenizer: PreTrainedTokenizerBase) -> bool | None:
    """`bos` of `pack`: first in every window where the tokenizer has one, though it may not put it there itself."""
    return None if tokenizer.bos_token_id is None else True


def mask_token(tokenizer: PreTrainedTokenizerBase | None, model: object) -> int:
    """The id of the mask token, for a model that predicts masked tokens.

    Raises:
        FactorMixError: there is none.
    """
    found = None if tokenizer is None else tokenizer.mask_token_id
    if found is None:
        raise FactorMixError(
            f"{type(model).__name__} learns and is judged by masked tokens; its tokenizer has no mask token."
        )
    return int(found)


def fitting(window: int, config: PretrainedConfig) -> int:
    """`window` tokens, or as many as the model has positions."""
    return min(window, getattr(config, "max_position_embeddings", None) or window)


def around(tokenizer: PreTrainedTokenizerBase, bos: bool | None) -> tuple[list[int], list[int]]:
    """The ids that go before and after the text of every window."""
    probe = "a"
    plain = tokenizer(probe, add_special_tokens=False)["input_ids"]
    full = tokenizer(probe, add_special_tokens=True)["input_ids"]
    start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), None)
    if start is None:
        raise FactorMixError(
            f"{type(tokenizer).__name__} changes a text when it adds special tokens; cannot pack with it."
        )
    prefix, suffix = full[:start], full[start + len(plain) :]
    if bos is False:
        return [], suffix
    if bos and not prefix:
        if tokenizer.bos_token_id is None:
            raise FactorMixError(f"bos=True, and {type(tokenizer).__name__} has no BOS token; use bos=None.")
        prefix = [tokenizer.bos_token_id]
    return prefix, suffix


def _stream(texts: list[str], tokenizer: PreTrainedTokenizerBase, wanted: int | None) -> tuple[list[int], list[bool]]:
    """Ids of the documents one after another, joined by EOS, and which of them are text; stops at `wanted`."""
    ids: list[int] = []
    is_text: list[bool] = []
    joint = tokenizer.eos_token_id
    with _long_texts_allowed(tokenizer):
        for encoded in _encoded(texts, tokenizer, ids, wanted):
            if ids and joint is not None:
                ids.append(joint)
                is_text.append(False)
            ids.extend(encoded)
            is_text.extend([True] * len(encoded))
            if wanted is not None and len(ids) >= wanted:
                return ids[:wanted], is_text[:wanted]
    return ids, is_text


def _encoded(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, ids: list[int], wanted: int | None
) -> Iterator[list[int]]:
    """The ids of each document in turn; looks at how far `ids` has come to tokenise no more than is needed."""
    position = 0
    while position < len(texts):
        budget = BATCH_CHARACTERS
        if wanted is not None:
            budget = min(budget, (wanted - len(ids)) * CHARACTERS_PER_TOKEN)
        batch: list[str] = []
        characters = 0
        while position < len(texts) and len(batch) < BATCH_DOCUMENTS and (not batch or characters < budget):
            batch.append(texts[position])
            characters += len(texts[position])
            position += 1
        if wanted is not None and len(batch) == 1 and characters > 2 * budget:
            # One document much longer than what is missing: its beginning, cut before a space, has the same tokens.
            cut = max(batch[0].rfind(" ", 0, budget), batch[0].rfind("\n", 0, budget))
            beginning = tokenizer(batch[0][:cut], add_special_tokens=False)["input_ids"] if cut > 0 else []
            if len(beginning) >= wanted - len(ids):
                yield beginning
                return
        yield from tokenizer(batch, add_special_tokens=False)["input_ids"]


@contextlib.contextmanager
def _long_texts_allowed(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """No warning about documents longer than a window: they are cut afterwards."""
    before = tokenizer.model_max_length
    tokenizer.model_max_length = int(1e30)
    try:
        yield
    finally:
        tokenizer.model_max_length = before


def _repeat(ids: list[int], rows: int) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64).expand(rows, -1)  # (N, len(ids))
