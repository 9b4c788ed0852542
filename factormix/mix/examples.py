"""Stage 2's data as micro-batches: labelled examples for a head, prompts and plain text for a language-modelling head.

Every batch is padded on the right, whatever the tokenizer does by itself.
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
        rows: token ids; one row, or one for each choice.
        target: what the loss is given, None without a label.
    """

    rows: list[list[int]]
    target: Any = None


def read_examples(path: str | Path, kind: str = "auto") -> Labelled | Documents:
    """Read a task's file: labelled text, prompts with targets, or plain text.

    Raises:
        FactorMixError: as `read_labelled` and `read_documents`.
    """
    file = Path(path)
    if kind == "auto" and (file.suffix != ".jsonl" or not file.is_file() or not _first_line_has(file, "label")):
        return read_documents(file)
    return read_labelled(file, kind)


def _first_line_has(file: Path, key: str) -> bool:
    """Whether the first line, read as text, names the key; a line that is no JSON is refused by who reads it."""
    with open(file, encoding="utf-8", errors="replace") as stream:
        first = next((line for line in stream if line.strip()), "")
    return f'"{key}"' in first


def encode(examples: Labelled, tokenizer: PreTrainedTokenizerBase, task: Task) -> list[Example]:
    """Tokenise; what is longer than ``task.window`` loses the end of its text (never of a choice).

    A tokenizer with a separator token gets text and choice as a pair, any other as one text. Where windows of stage 1
    begin with a beginning-of-sequence token, examples do too.

    Raises:
        FactorMixError: a choice that leaves no room for its text.
    """
    starts = tokenizer.bos_token_id if tokenizer.cls_token_id is None else None

    def ids_of(*parts: str) -> list[int]:
        room = task.window - (starts is not None)
        try:
            ids = list(tokenizer(*parts, truncation="only_first", max_length=room)["input_ids"])
        except Exception as error:  # fast tokenizers raise their own class where the second part alone is too long
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
    """The text's tokens, cut so that the choice's fit behind them."""
    more = list(tokenizer(choice, add_special_tokens=False)["input_ids"])
    if len(more) >= task.window:
        raise FactorMixError(f"choice {choice[:60]!r} is {len(more)} tokens; a window has {task.window}.")
    return [*text[: task.window - len(more)], *more]


def collate(examples: Sequence[Example], task: Task, pad: int) -> dict[str, Tensor]:
    """A batch.

    Returns:
        "input_ids", "attention_mask" (N, L) int64; "sizes" (B,) int64, rows of each example (N is their sum);
        "targets" (B,) or (B, labels), where the examples have them.
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
    """Logits of rows to logits of examples: (N, outputs) -> (B, outputs), for multiple choice (N, 1) -> (B, choices)
    with -inf where an example has fewer choices than another."""
    if len(sizes) == len(logits):
        return logits
    table = logits.new_full((len(sizes), int(sizes.max())), float("-inf"))  # (B, C)
    there = torch.arange(table.shape[1], device=sizes.device) < sizes[:, None]  # (B, C)
    table[there] = logits[:, 0]
    return table


class LabelledBatches:
    """`factormix.train.Batches` of labelled examples: every epoch in another order, cut into steps.

    Args:
        examples: encoded.
        batch_size: examples of one step.
        epochs: passes over them.
        seed: of the orders.
    """

    def __init__(
        self, examples: Sequence[Example], task: Task, pad: int, batch_size: int, epochs: int, seed: int
    ) -> None:
        self.examples, self.task, self.pad, self.seed = examples, task, pad, seed
        self.batch_size = min(batch_size, len(examples))
        self.steps_per_epoch = -(-len(examples) // self.batch_size)
        self.epochs = epochs
        total = sum(len(row) for example in examples for row in example.rows)
        self.tokens = max(1, round(total / self.steps_per_epoch))  # mean of a step, padding left out

    def __len__(self) -> int:
        return self.steps_per_epoch * self.epochs

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, step = divmod(index, self.steps_per_epoch)
        order = list(range(len(self.examples)))
        random.Random(f"{self.seed} {epoch}").shuffle(order)
        chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
        return collate([self.examples[i] for i in chosen], self.task, self.pad)


class LanguageBatches:
    """`factormix.train.Batches` of prompts with targets or of windows of plain text, as `InjectionLoss` reads them.

    Args:
        documents: of kind "knowledge" (prompts), or any other as plain text.
        window: tokens of a micro-batch.
        tokens: of plain text, at most.
        epochs: passes over them; for plain text the loop repeats by itself.
        seed: of the order.
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
