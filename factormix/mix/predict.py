"""Predict with a stage-2 model: labels with probabilities, numbers, choices, or answers to prompts."""

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
    """Predict the answers to examples, labelled or not.

    Args:
        mix: the model.
        task: its task.
        examples: the examples.
        tokenizer: the model's tokenizer.
        batch_size: examples that run together.

    Returns:
        For each example "prediction" (a label, a list of labels, a number, or the text of a choice) and "scores"
        (probabilities by label or choice; empty for a regression).

    Raises:
        FactorMixError: the examples have choices and the task has none, or the reverse; or `encode` refuses.
    """
    if (task.kind == "multiple-choice") != (examples.choices is not None):
        raise FactorMixError(
            f"{examples.name}: the task is {task.kind}, but its lines have {'' if examples.choices else 'no '}"
            "'choices'. Give examples of the task's own kind."
        )
    logits = example_logits(mix, encode(examples, tokenizer, task), task, tokenizer.pad_token_id or 0, batch_size)
    predicted = task.predict(logits)
    if examples.choices is not None:
        predicted = [choices[i] for choices, i in zip(examples.choices, predicted)]
    scores = task.scores(logits, examples.choices)
    return [
        {"prediction": list(prediction) if isinstance(prediction, tuple) else prediction, "scores": example_scores}
        for prediction, example_scores in zip(predicted, scores)
    ]


def predict_prompts(
    mix: MixModel, prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> list[dict[str, Any]]:
    """Answer prompts by greedy decoding, one at a time. A prompt ends before ``{}`` if it contains that.

    Args:
        mix: the model.
        prompts: the prompts.
        tokenizer: the model's tokenizer.
        max_new_tokens: the most tokens of an answer.

    Raises:
        FactorMixError: the model does not generate.
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
