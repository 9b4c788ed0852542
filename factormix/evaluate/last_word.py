"""Measure last-word accuracy: how often a model predicts the last word of a passage, after LAMBADA (arXiv 1606.06031).

    passages = cut_passages(documents.texts, tokenizer, tokens=20_480)
    right = last_words(model, passages)         # (n,) 1 where every token of the last word was the likeliest

A passage is a few whole sentences of held-out prose without their last word. An answer is right if greedy decoding
would write all tokens of that word. People chose LAMBADA's passages so that the context determines the word. These
passages are not chosen, so the accuracies cannot be compared with LAMBADA's. Guessing has an accuracy of 0.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from factormix.data.packing import wants_bos
from factormix.evaluate.causal import accepts, check_next_token
from factormix.run.errors import FactorMixError
from factormix.run.progress import progress

WORDS = 60  # the fewest words of a passage; LAMBADA's passages have 75 on average
MOST_WORDS = 120  # the most words of a passage; longer ones come from text without sentences
BATCH_TOKENS = 2048  # the most tokens of one forward, padding included
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+")
_LAST_WORD = re.compile(r"(?P<before>.*\S)\s(?P<word>[A-Za-z][A-Za-z'’-]*)[.!?]+[\"')\]]*$", re.DOTALL)


@dataclass(frozen=True)
class Passage:
    """One passage.

    Attributes:
        ids: token ids of the passage with its last word.
        answer: number of tokens at the end of `ids` that are the last word.
    """

    ids: tuple[int, ...]
    answer: int


def cut_passages(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, tokens: int = 20_480, seed: int = 0
) -> list[Passage]:
    """Draw passages from all over the texts until they have `tokens` tokens, or until there are no more.

    Args:
        texts: documents of prose.
        tokenizer: the model's. If it has a beginning-of-sequence token, that opens each passage.
        tokens: tokens of all passages together.
        seed: seed of the order in which passages are taken.

    Raises:
        FactorMixError: the texts have fewer than two passages.
    """
    found = [passage for text in texts for passage in _passages(text)]
    random.Random(seed).shuffle(found)
    start = [tokenizer.bos_token_id] if wants_bos(tokenizer) else []
    made: list[Passage] = []
    total = 0
    for before, word in found:
        context = tokenizer(before, add_special_tokens=False)["input_ids"]
        whole = tokenizer(f"{before} {word}", add_special_tokens=False)["input_ids"]
        if whole[: len(context)] != context or len(whole) == len(context):
            continue  # the word changes the tokens before it, so greedy decoding cannot write it
        made.append(Passage((*start, *whole), len(whole) - len(context)))
        total += len(made[-1].ids)
        if total >= tokens:
            break
    if len(made) < 2:
        raise FactorMixError(
            f"the text has {len(made)} passages of {WORDS} words that end in a word; last-word accuracy needs at least "
            "two. Give more prose."
        )
    return made


def last_words(model: nn.Module, passages: Sequence[Passage], quiet: bool = True) -> Tensor:
    """Ask one model for the last word of each passage.

    Args:
        model: a causal language model.
        passages: the n passages, from `cut_passages`.
        quiet: show no progress line.

    Returns:
        (n,) float32, 1 where the model's likeliest tokens are all tokens of the last word, else 0.

    Raises:
        FactorMixError: the model has no next-token logits.
    """
    return last_words_for({"model": model}, passages, quiet)["model"]


def last_words_for(
    models: Mapping[str, nn.Module], passages: Sequence[Passage], quiet: bool = True
) -> dict[str, Tensor]:
    """Like `last_words`, for several models by name."""
    for name, model in models.items():
        check_next_token(model, name)
    order = sorted(range(len(passages)), key=lambda i: len(passages[i].ids))  # similar lengths share a batch
    batches: list[list[int]] = [[]]
    for i in order:
        if batches[-1] and (len(batches[-1]) + 1) * len(passages[i].ids) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(i)
    right = {name: torch.zeros(len(passages)) for name in models}
    for batch in progress(batches, label="last words", total=len(batches), quiet=quiet):
        for name, model in models.items():
            right[name][batch] = _right(model, [passages[i] for i in batch])
    return right


def _passages(text: str) -> list[tuple[str, str]]:
    """Each passage as (all but the last word, the last word), in the text's order."""
    found: list[tuple[str, str]] = []
    sentences: list[str] = []
    for sentence in _SENTENCE_END.split(" ".join(text.split())):
        sentences.append(sentence)
        words = sum(len(part.split()) for part in sentences)
        if words >= WORDS:
            match = _LAST_WORD.fullmatch(" ".join(sentences))
            if match and words <= MOST_WORDS:
                found.append((match["before"], match["word"]))
            sentences = []
    return found


@torch.inference_mode()
def _right(model: nn.Module, passages: Sequence[Passage]) -> Tensor:
    """`last_words` of one batch, (n,). It is padded at the end, because a causal model does not see later tokens."""
    device = next(model.parameters()).device
    length = max(len(passage.ids) for passage in passages)
    ids = torch.zeros(len(passages), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    asked = torch.zeros_like(ids, dtype=torch.bool)  # True if the next token belongs to the answer
    for row, passage in enumerate(passages):
        size = len(passage.ids)
        ids[row, :size] = torch.tensor(passage.ids)
        mask[row, :size] = 1
        asked[row, size - passage.answer - 1 : size - 1] = True
    kept = asked.any(0).nonzero()[:, 0]  # (P,) the positions whose logits are needed
    was_training = model.training
    model.eval()
    try:
        only = {"logits_to_keep": kept.to(device)} if accepts(model, "logits_to_keep") else {}
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        logits = model(**inputs, use_cache=False, **only).logits  # (B, P, V), or (B, L, V)
    finally:
        model.train(was_training)
    predicted = (logits if only else logits[:, kept.to(device)]).argmax(-1).cpu()  # (B, P)
    same = predicted == ids[:, kept + 1]  # (B, P)
    return (same | ~asked[:, kept]).all(1).float()
