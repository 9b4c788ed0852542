"""Recall of facts: what counts as recalled, alone and in any batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from factormix.data.text import Documents, read_documents
from factormix.evaluate import recall as module
from factormix.evaluate.recall import recall
from factormix.run.errors import FactorMixError
from tests.evaluate.tiny import VOCAB


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", pad_token="w0")


def facts_of(path: Path, *facts: tuple[str, list[str]]) -> Documents:
    lines = [f'{{"prompt": "{prompt}", "targets": {targets}}}'.replace("'", '"') for prompt, targets in facts]
    (path / "facts.jsonl").write_text("\n".join(lines))
    return read_documents(path / "facts.jsonl")


def greedy(model: LlamaForCausalLM, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


def test_recalled_is_what_greedy_decoding_says(
    llama: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = llama()
    prompts = [[5, 9, 30], [7], [11, 80, 3, 4, 60, 2]]
    told = [greedy(model, ids, 2) for ids in prompts]
    words = [" ".join(f"w{i}" for i in ids) for ids in prompts]
    right, half = ([f"w{a} w{b}" for a, b in told], [f"w{a} w{(b + 1) % VOCAB}" for a, b in told])
    wrong = f"w{(told[2][0] + 1) % VOCAB}"
    facts = facts_of(
        tmp_path,
        (words[0], [right[0]]),
        (words[1], [half[1]]),  # the first token only
        (words[2], [wrong]),
        (words[2] + " {}", [wrong, right[2]]),  # one of two suffices
    )
    score = recall(model, tokenizer, facts)
    assert (score.facts, score.exact, score.first_token) == (4, 0.5, 0.75)
    monkeypatch.setattr(module, "BATCH", 1)
    alone = recall(model, tokenizer, facts)
    assert (alone.exact, alone.first_token) == (0.5, 0.75) and alone.loss == pytest.approx(score.loss, rel=1e-5)
    assert recall(model, tokenizer, facts, limit=1).exact == 1


def test_the_loss_is_a_mean_over_target_tokens(
    llama: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = llama()

    def nats(ids: list[int]) -> Tensor:
        return -model(torch.tensor([ids[:-1]])).logits[0, -1].log_softmax(-1)[ids[-1]]

    expected = (nats([5, 6, 7]) + nats([8, 9]) + nats([8, 9, 10])) / 3
    score = recall(model, tokenizer, facts_of(tmp_path, ("w5 w6", ["w7"]), ("w8", ["w9 w10"])))
    assert score.loss == pytest.approx(float(expected.detach()), rel=1e-4)


def test_plain_text_has_no_facts(llama: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(FactorMixError, match='text is text; allowed: facts, lines of {"prompt", "targets"}'):
        recall(llama(), tokenizer, read_documents(["w1 w2"]))
