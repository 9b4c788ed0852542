"""Choose general text by retrieval: for each micro-batch of knowledge, the nearest general passage (MixDA with REALM).

    batches.beside = nearest(batches, tokenizer, lambda: TextEncoder(encoder, its_tokenizer))

A passage is a window of general text. A small encoder reads the texts of all windows once. The nearest passage has the
largest cosine of the mean last hidden states, and the search is exact. In the released code the passages had no effect,
because it added them after tokenising.
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

POOL = 4  # windows of general text to choose from, as a multiple of those that are chosen
ROWS = 16  # texts in one forward of the encoder
CHUNK = 4096  # rows of knowledge whose cosines are computed at a time


class TextEncoder:
    """Turns texts into vectors of unit length: the normalised mean of a model's last hidden states.

    Args:
        model: an encoder or a decoder, with or without a head.
        tokenizer: its tokenizer. Texts that are too long for the model are cut.

    Raises:
        FactorMixError: the model is an encoder-decoder.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if model.config.is_encoder_decoder:
            raise FactorMixError(f"{type(model).__name__} is an encoder-decoder; a retriever needs one stack.")
        self.model, self.tokenizer = cast(PreTrainedModel, model.base_model).eval(), tokenizer
        positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
        self.length = min(positions, tokenizer.model_max_length)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """The vectors of N texts: (N, H) float32 on the CPU."""
        rows = [row or [0] for row in self.tokenizer(list(texts), truncation=True, max_length=self.length)["input_ids"]]
        length = max(map(len, rows))
        ids = torch.tensor([row + [self.tokenizer.pad_token_id or 0] * (length - len(row)) for row in rows])  # (N, L)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])  # (N, L)
        inputs: dict[str, Any] = {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}
        states = self.model(**inputs, **no_cache(self.model)).last_hidden_state.float().cpu()  # (N, L, H)
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
    """Find the nearest general window for each micro-batch that has one beside it.

    Args:
        batches: the knowledge, and the general text to choose from.
        tokenizer: tokenizer of the model that is trained, which decodes the windows.
        encoder: makes the encoder. It is not called if the work directory holds the vectors already.
        work: keeps the vectors, so that a killed run does not compute them again.
        quiet: show no progress bar.

    Returns:
        The windows' numbers, for `Stage1Batches.beside`.
    """
    with_general = [i % batches.distinct for i in range(0, len(batches), batches.old_every)]
    read = sorted(set(with_general))
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
    return [passage[i] for i in with_general]


def _vectors(texts: Sequence[str], encode: TextEncoder, label: str, quiet: bool) -> Tensor:
    starts = range(0, len(texts), ROWS)
    return torch.cat([encode(texts[i : i + ROWS]) for i in progress(starts, label, len(starts), quiet)])  # (N, H)


def _text(batch: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a micro-batch: its rows without padding."""
    rows = zip(batch["input_ids"], batch["attention_mask"])
    return "\n".join(_plain(ids[mask.bool()], tokenizer) for ids, mask in rows)


def _plain(ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))
