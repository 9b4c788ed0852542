"""What a stage-2 model says about new text: labels with probabilities, numbers, choices, or the answer to a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from factormix.data.labelled import Labelled
from factormix.mix.examples import encode
from factormix.mix.mix_model import MixModel
from factormix.mix.score import example_logits
from factormix.mix.task import Task
from factormix.run.errors import FactorMixError


def predict_examples(
    mix: MixModel, task: Task, examples: Labelled, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8
) -> list[dict[str, Any]]:
    """Predictions for examples, labelled or not.

    Returns:
        For each example "prediction" (a label, a list of labels, a number, or the choice itself) and "scores"
        (probabilities by label or choice, empty for a regression).

    Raises:
        FactorMixError: examples without choices for a multiple-choice task; as `encode`.
    """
    if (task.kind == "multiple-choice") != (examples.choices is not None):
        raise FactorMixError(
            f"{examples.name}: the task is {task.kind}; its lines have {'' if examples.choices else 'no '}'choices'."
        )
    logits = example_logits(mix, encode(examples, tokenizer, task), task, tokenizer.pad_token_id or 0, batch_size)
    said = task.predict(logits)
    if examples.choices is not None:
        said = [choices[i] for choices, i in zip(examples.choices, said)]
    scores = task.scores(logits, examples.choices)
    return [
        {"prediction": list(p) if isinstance(p, tuple) else p, "scores": of_example}
        for p, of_example in zip(said, scores)
    ]


def predict_prompts(
    mix: MixModel, prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> list[dict[str, Any]]:
    """Greedy answers to prompts, each alone; what stands before ``{}`` is the prompt, or all of it.

    Raises:
        FactorMixError: a model that does not generate.
    """
    return [{"prediction": _answer(mix, prompt, tokenizer, max_new_tokens)} for prompt in prompts]


def _answer(mix: MixModel, prompt: str, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> str:
    before = prompt.partition("{}")[0].rstrip()  # the space before the answer belongs to its first token
    ids = list(tokenizer(before)["input_ids"])
    starts = tokenizer.bos_token_id
    if starts is not None and tokenizer.cls_token_id is None and ids[:1] != [starts]:
        ids = [starts, *ids]
    row = torch.tensor([ids], device=mix.device)  # (1, L)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = mix.generate(row, torch.ones_like(row), max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad)
    return str(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)).strip()
