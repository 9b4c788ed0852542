"""Last-word accuracy: how often a model says the last word of a passage, after LAMBADA (arXiv 1606.06031).

    passages = cut_passages(documents.texts, tokenizer, tokens=20_480)
    right = last_words(model, passages)         # (n,) 1 where every token of the last word was the likeliest

A passage is some whole sentences of held-out prose without their last word; the answer is that word, and it counts when
greedy decoding would write all its tokens. LAMBADA's passages were chosen by people so that the word can be told from
the context; these are not chosen, so the accuracies are not those of LAMBADA. There is no guessing: chance is 0.
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

WORDS = 60  # a passage has so many words or a few more, as LAMBADA's have (75 on average)
MOST_WORDS = 120  # a longer one, from text without sentences, is left out
BATCH_TOKENS = 2048  # tokens of one forward, padding included
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+")
_LAST_WORD = re.compile(r"(?P<before>.*\S)\s(?P<word>[A-Za-z][A-Za-z'’-]*)[.!?]+[\"')\]]*$", re.DOTALL)


@dataclass(frozen=True)
class Passage:
    """Token ids of a passage with its last word; the last `answer` of them are the word."""

    ids: tuple[int, ...]
    answer: int


def cut_passages(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, tokens: int = 20_480, seed: int = 0
) -> list[Passage]:
    """Passages from all over the texts until they have `tokens` tokens, or as many as there are.

    Args:
        texts: documents of prose.
        tokenizer: BOS opens each passage where it has one.
        tokens: of all passages together.
        seed: of the order in which passages are taken.

    Raises:
        FactorMixError: fewer than two passages in the text.
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
            continue  # the word changes the tokens before it: no greedy continuation can write it
        made.append(Passage((*start, *whole), len(whole) - len(context)))
        total += len(made[-1].ids)
        if total >= tokens:
            break
    if len(made) < 2:
        raise FactorMixError(
            f"the text has {len(made)} passages of {WORDS} words that end in a word; last-word accuracy needs two. "
            "Give more prose."
        )
    return made


def last_words(model: nn.Module, passages: Sequence[Passage], quiet: bool = True) -> Tensor:
    """(n,) float, 1 where the model's likeliest tokens are the passage's last word, all of them.

    Raises:
        FactorMixError: a model without next-token logits.
    """
    return last_words_for({"model": model}, passages, quiet)["model"]


def last_words_for(
    models: Mapping[str, nn.Module], passages: Sequence[Passage], quiet: bool = True
) -> dict[str, Tensor]:
    """`last_words` for several models by name."""
    for name, model in models.items():
        check_next_token(model, name)
    order = sorted(range(len(passages)), key=lambda i: len(passages[i].ids))  # near lengths share a batch
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
    """(all but the last word, the last word) of each passage, front to back."""
    found: list[tuple[str, str]] = []
    sentences: list[str] = []
    for sentence in _SENTENCE_END.split(" ".join(text.split())):
        sentences.append(sentence)
        words = sum(len(each.split()) for each in sentences)
        if words >= WORDS:
            match = _LAST_WORD.fullmatch(" ".join(sentences))
            if match and words <= MOST_WORDS:
                found.append((match["before"], match["word"]))
            sentences = []
    return found


@torch.inference_mode()
def _right(model: nn.Module, passages: Sequence[Passage]) -> Tensor:
    """(n,) of one batch, padded at the end, where a causal model does not look."""
    device = next(model.parameters()).device
    length = max(len(each.ids) for each in passages)
    ids = torch.zeros(len(passages), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    at = torch.zeros_like(ids, dtype=torch.bool)  # where the token that follows is of the answer
    for row, each in enumerate(passages):
        size = len(each.ids)
        ids[row, :size] = torch.tensor(each.ids)
        mask[row, :size] = 1
        at[row, size - each.answer - 1 : size - 1] = True
    kept = at.any(0).nonzero()[:, 0]  # (P,) the positions whose logits are needed
    was_training = model.training
    model.eval()
    try:
        only = {"logits_to_keep": kept.to(device)} if accepts(model, "logits_to_keep") else {}
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        logits = model(**inputs, use_cache=False, **only).logits  # (B, P, V), or (B, L, V)
    finally:
        model.train(was_training)
    said = (logits if only else logits[:, kept.to(device)]).argmax(-1).cpu()  # (B, P)
    same = said == ids[:, kept + 1]  # (B, P)
    return (same | ~at[:, kept]).all(1).float()
