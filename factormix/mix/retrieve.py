"""Retention text by retrieval: beside each micro-batch of knowledge, the general passage nearest to it (MixDA, the
REALM option; the released code added its passages after tokenising, so that they did nothing).

    batches.beside = nearest(batches, tokenizer, lambda: TextEncoder(encoder, its_tokenizer))

A passage is a window of general text. A small encoder reads the texts of all windows once; nearness is the cosine of
its mean last hidden states, and the search is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factormix.mix.batches import Stage1Batches
from factormix.mix.losses import no_cache
from factormix.run.errors import FactorMixError
from factormix.run.progress import progress
from factormix.run.workdir import WorkDirectory

POOL = 4  # windows of general text to choose from, for each one that is chosen
ROWS = 16  # texts in one forward of the encoder
CHUNK = 4096  # rows of knowledge whose cosines are held at a time


class TextEncoder:
    """Texts as vectors of unit length: the mean of a model's last hidden states.

    Args:
        model: an encoder, with or without a head; a decoder will do.
        tokenizer: its own. What is longer than its model takes is cut.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if model.config.is_encoder_decoder:
            raise FactorMixError(f"{type(model).__name__} is an encoder-decoder; a retriever needs one stack.")
        self.model, self.tokenizer = cast(PreTrainedModel, model.base_model).eval(), tokenizer
        positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
        self.length = min(positions, tokenizer.model_max_length)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Vectors of texts (N, H), float32 on the CPU."""
        rows = [row or [0] for row in self.tokenizer(list(texts), truncation=True, max_length=self.length)["input_ids"]]
        length = max(map(len, rows))
        ids = torch.tensor([row + [self.tokenizer.pad_token_id or 0] * (length - len(row)) for row in rows])  # (N, L)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])  # (N, L)
        there: dict[str, Any] = {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}
        states = self.model(**there, **no_cache(self.model)).last_hidden_state.float().cpu()  # (N, L, H)
        weights = mask.unsqueeze(-1).float()  # (N, L, 1)
        return nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)  # (N, H)


def nearest(
    batches: Stage1Batches,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Callable[[], TextEncoder],
    *,
    work: WorkDirectory | None = None,
    quiet: bool = False,
) -> list[int]:
    """The general window nearest to each micro-batch of knowledge that has one beside it, for `Stage1Batches.beside`.

    Args:
        batches: knowledge, and general text to choose from.
        tokenizer: of the model that is taught, to read the windows by.
        encoder: makes the encoder; called only where the work directory does not hold the vectors yet.
        work: keeps the vectors, so that a killed run does not compute them again.
        quiet: no progress bar.
    """
    taught = [i % batches.distinct for i in range(0, len(batches), batches.old_every)]  # those that have L_S
    read = sorted(set(taught))
    if work is not None and work.done("passages"):
        vectors, _ = work.load("passages")
    else:
        knowledge = [_text(batches.knowledge(i), tokenizer) for i in read]
        general = [_plain(row, tokenizer) for row in batches.general.input_ids]
        encode = encoder()
        vectors = {
            "knowledge": _vectors(knowledge, encode, "reading the knowledge", quiet),
            "general": _vectors(general, encode, "reading the general text", quiet),
        }
        if work is not None and PartialState().is_main_process:
            work.save("passages", vectors)
    parts = vectors["knowledge"].split(CHUNK)  # (n, H) each
    found = [i for part in parts for i in (part @ vectors["general"].T).argmax(1).tolist()]  # (n, G) -> (n,)
    passage = dict(zip(read, found, strict=True))
    return [passage[i] for i in taught]


def _vectors(texts: Sequence[str], encode: TextEncoder, label: str, quiet: bool) -> Tensor:
    starts = range(0, len(texts), ROWS)
    return torch.cat([encode(texts[i : i + ROWS]) for i in progress(starts, label, len(starts), quiet)])  # (N, H)


def _text(batch: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase) -> str:
    """What a micro-batch says: its rows, padding left out."""
    rows = zip(batch["input_ids"], batch["attention_mask"])
    return "\n".join(_plain(ids[mask.bool()], tokenizer) for ids, mask in rows)


def _plain(ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))
