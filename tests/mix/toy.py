"""A toy world for stage 2: tiny models, two random domain adapters, a tokenizer of words, tasks that words decide."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from factormix.data.labelled import Labelled
from factormix.mix.adapt_config import AdaptConfig
from factormix.mix.mix_model import MixModel
from factormix.mix.task_adapters import TaskAdapterSpec
from tests.cli.tiny import save_tiny
from tests.families import VOCAB, tiny_model
from tests.mix.adapted import saved

FAMILIES = ("llama", "gpt2", "gemma3_text", "bert", "albert", "modernbert")
LABELLED = ("single-label", "multi-label", "regression", "multiple-choice")
QUICK = AdaptConfig(epochs=12, batch_size=8, lr=1e-2, window=16)


def domains(family: str, folder: Path, make: Callable[[], PreTrainedModel] | None = None) -> dict[str, Path]:
    """Two adapter directories: of random weights, "pubmed" and "reviews", both at the first layer."""
    make = make or (lambda: tiny_model(family))
    return {name: saved(folder, make(), name, seed=seed) for seed, name in enumerate(("pubmed", "reviews"))}


def mix(
    model: PreTrainedModel, folders: dict[str, Path], kind: str = "pfeiffer", outputs: int = 3, **more: Any
) -> MixModel:
    """A fresh stage-2 model; its head is random."""
    torch.manual_seed(0)
    return MixModel(model, folders, TaskAdapterSpec(kind, reduction=4, tokens=5), outputs, **more)


def disturb(model: MixModel, seed: int = 0) -> None:
    """Random weights in all that trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in model.trained:
                scale = min(0.3, 2 * parameter.shape[-1] ** -0.5)  # the paper's gate is an MLP, 768 wide
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Words w0 to w93."""
    return AutoTokenizer.from_pretrained(save_tiny("llama", folder / "words"))


def padded(rows: list[list[int]], side: str = "right", extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of rows of unlike length."""
    length = max(map(len, rows)) + extra
    ids, mask = torch.full((len(rows), length), 7), torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, at], mask[i, at] = torch.tensor(row), 1
    return ids, mask


def examples(kind: Any = "single-label", count: int = 48, seed: int = 0) -> Labelled:
    """Texts of random words; which of w0, w1, w2 is among them decides the label."""
    draw = random.Random(seed)
    texts, labels, choices = [], [], []
    for i in range(count):
        mark = i % 3
        words = [f"w{draw.randrange(10, VOCAB - 5)}" for _ in range(draw.randrange(3, 8))]
        words.insert(draw.randrange(len(words) + 1), f"w{mark}")
        texts.append(" ".join(words))
        labels.append(
            {
                "single-label": "abc"[mark],
                "multi-label": ((), ("a",), ("a", "b"))[mark],
                "regression": float(mark),
                "multiple-choice": mark,
            }[kind]
        )
        choices.append([f"w{30 + c}" for c in range(3)] if i % 2 or mark == 2 else ["w30", "w31"])
    records = [{"text": t, "label": label} for t, label in zip(texts, labels)]
    return Labelled("toy", kind, texts, labels, choices if kind == "multiple-choice" else None, records, "")
