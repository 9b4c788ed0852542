"""Make the micro-batches of stage 2: labelled examples for a head, prompts and plain text for a language-model head.

Every batch is padded on the right, no matter on which side the tokenizer pads.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from factormix.data.facts import fact_of
from factormix.data.labelled import Labelled, read_labelled
from factormix.data.text import Documents, read_documents
from factormix.mix.batches import fact_rows, pack_some, window_batch
from factormix.mix.task import Task
from factormix.run.errors import FactorMixError


@dataclass(frozen=True)
class Example:
    """One labelled example.

    Attributes:
        rows: token ids: one row, or one row for each choice.
        target: the target of the loss, or None without a label.
    """

    rows: list[list[int]]
    target: Any = None


def read_examples(path: str | Path, kind: str = "auto") -> Labelled | Documents:
    """Read a task's file: labelled text, prompts with targets, or plain text.

    Args:
        path: the file.
        kind: kind of the task, or "auto" to find it from the file.

    Raises:
        FactorMixError: `read_labelled` or `read_documents` refuses the file.
    """
    file = Path(path)
    if kind == "auto" and (file.suffix != ".jsonl" or not file.is_file() or not _first_line_has(file, "label")):
        return read_documents(file)
    return read_labelled(file, kind)


def _first_line_has(file: Path, key: str) -> bool:
    """True if the text of the first line contains the key. The line is not parsed here; its reader checks the JSON."""
    with open(file, encoding="utf-8", errors="replace") as stream:
        first = next((line for line in stream if line.strip()), "")
    return f'"{key}"' in first


def encode(examples: Labelled, tokenizer: PreTrainedTokenizerBase, task: Task) -> list[Example]:
    """Tokenise examples. If an example is longer than ``task.window``, the end of its text is cut, never a choice.

    A tokenizer with a separator token gets text and choice as a pair, any other tokenizer as one text. Examples start
    with a beginning-of-sequence token if the windows of stage 1 do.

    Args:
        examples: the examples, labelled or not.
        tokenizer: the model's tokenizer.
        task: gives the window and the targets.

    Raises:
        FactorMixError: a choice leaves no room for its text.
    """
    starts = tokenizer.bos_token_id if tokenizer.cls_token_id is None else None

    def ids_of(*parts: str) -> list[int]:
        room = task.window - (starts is not None)
        try:
            ids = list(tokenizer(*parts, truncation="only_first", max_length=room)["input_ids"])
        except Exception as error:  # fast tokenizers raise their own class if the second part alone is too long
            raise FactorMixError(f"{parts[-1][:60]!r} leaves no room in a window of {task.window}: {error}.") from error
        return ids if starts is None or ids[:1] == [starts] else [starts, *ids]

    def rows_of(i: int) -> list[list[int]]:
        if examples.choices is None:
            return [ids_of(examples.texts[i])]
        if tokenizer.sep_token_id is not None:
            return [ids_of(examples.texts[i], choice) for choice in examples.choices[i]]
        return [_joined(ids_of(examples.texts[i]), f" {choice}", tokenizer, task) for choice in examples.choices[i]]

    targets = [None] * len(examples) if examples.labels is None else [task.target(label) for label in examples.labels]
    return [Example(rows_of(i), target) for i, target in enumerate(targets)]


def _joined(text: list[int], choice: str, tokenizer: PreTrainedTokenizerBase, task: Task) -> list[int]:
    """The tokens of the text and then of the choice. The text is cut so that both fit into a window."""
    choice_ids = list(tokenizer(choice, add_special_tokens=False)["input_ids"])
    if len(choice_ids) >= task.window:
        raise FactorMixError(
            f"choice {choice[:60]!r} has {len(choice_ids)} tokens; allowed: fewer than the window of {task.window}."
        )
    return [*text[: task.window - len(choice_ids)], *choice_ids]


def collate(examples: Sequence[Example], task: Task, pad: int) -> dict[str, Tensor]:
    """Put B examples into one batch, padded on the right.

    Returns:
        "input_ids", "attention_mask" (N, L) int64; "sizes" (B,) int64, the number of rows of each example, whose sum
        is N; and "targets" (B,) or (B, labels) if the examples have targets.
    """
    rows = [row for example in examples for row in example.rows]
    length = max(map(len, rows))
    batch = {
        "input_ids": torch.tensor([row + [pad] * (length - len(row)) for row in rows]),  # (N, L)
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),  # (N, L)
        "sizes": torch.tensor([len(example.rows) for example in examples]),  # (B,)
    }
    if examples[0].target is not None:
        whole = task.kind in ("single-label", "multiple-choice")
        dtype = torch.int64 if whole else torch.float32
        batch["targets"] = torch.tensor([example.target for example in examples], dtype=dtype)
    return batch


def by_example(logits: Tensor, sizes: Tensor) -> Tensor:
    """Turn logits of rows into logits of examples.

    Args:
        logits: (N, outputs); for multiple choice (N, 1).
        sizes: (B,) int64, the number of rows of each example.

    Returns:
        (B, outputs); for multiple choice (B, most choices), with -inf where an example has fewer choices.
    """
    if len(sizes) == len(logits):
        return logits
    table = logits.new_full((len(sizes), int(sizes.max())), float("-inf"))  # (B, C)
    there = torch.arange(table.shape[1], device=sizes.device) < sizes[:, None]  # (B, C)
    table[there] = logits[:, 0]
    return table


class LabelledBatches:
    """The `factormix.train.Batches` of labelled examples. Every epoch has another order.

    Args:
        examples: encoded examples.
        task: the task.
        pad: id of the padding token.
        batch_size: examples of one optimiser step.
        epochs: passes over the examples.
        seed: seed of the orders.
    """

    def __init__(
        self, examples: Sequence[Example], task: Task, pad: int, batch_size: int, epochs: int, seed: int
    ) -> None:
        self.examples, self.task, self.pad, self.seed = examples, task, pad, seed
        self.batch_size = min(batch_size, len(examples))
        self.steps_per_epoch = -(-len(examples) // self.batch_size)
        self.epochs = epochs
        total = sum(len(row) for example in examples for row in example.rows)
        self.tokens = max(1, round(total / self.steps_per_epoch))  # the mean of a step, without padding

    def __len__(self) -> int:
        return self.steps_per_epoch * self.epochs

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, step = divmod(index, self.steps_per_epoch)
        order = list(range(len(self.examples)))
        random.Random(f"{self.seed} {epoch}").shuffle(order)
        chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
        return collate([self.examples[i] for i in chosen], self.task, self.pad)


class LanguageBatches:
    """The `factormix.train.Batches` of prompts with targets or of windows of plain text, for `KnowledgeLoss`.

    Args:
        documents: documents of kind "knowledge" (prompts); any other kind is read as plain text.
        tokenizer: the model's tokenizer.
        window: tokens of a micro-batch.
        tokens: the most tokens of plain text.
        epochs: passes over prompts. Plain text needs one, because the training loop repeats it.
        seed: seed of the order.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: PreTrainedTokenizerBase,
        window: int,
        tokens: int,
        epochs: int,
        seed: int,
    ) -> None:
        if documents.kind == "knowledge":
            pairs = [(r["prompt"], target) for r in documents.records for target in r["targets"]]
            facts = [fact_of(prompt, target, tokenizer, window) for prompt, target in pairs]
            self.rows = fact_rows(facts, window, tokenizer.pad_token_id or 0, seed)
        else:
            packed = pack_some(documents.plain(tokenizer), tokenizer, window, tokens, seed)
            self.rows = [window_batch(packed, i) for i in range(len(packed))]
        self.tokens = window
        self.steps_per_epoch = len(self.rows)
        self.epochs = epochs

    def __len__(self) -> int:
        return self.steps_per_epoch * self.epochs

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index % self.steps_per_epoch]
