"""A tiny model on disk with a tokenizer of words, and text that it can read."""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.families import VOCAB, tiny_model

CUT = ("--layout", "S1A1E4", "--tokens", "1024", "--window", "32")  # 4 slices of 16 of the 64 neurons


def save_tiny(family: str, folder: Path) -> Path:
    """A tiny model of a family, with a word-level tokenizer w0, w1, ..."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    words = [*special, *(f"w{i}" for i in range(VOCAB - len(special)))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    tiny_model(family).save_pretrained(folder)
    return folder


def write_text(path: Path, documents: int = 40, words: int = 100) -> Path:
    """Documents of random words."""
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(VOCAB - 5)}" for _ in range(words)) for _ in range(documents)]
    path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return path
