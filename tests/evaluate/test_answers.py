"""Greedy answers, alike for every model, whatever the model's generation config is used to."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, GenerationConfig, PreTrainedTokenizerFast

from factormix.evaluate.answers import answer
from factormix.run.errors import FactorMixError
from tests.evaluate.tiny import VOCAB


@pytest.fixture
def tokenizer():
    """Words w3 ... w96 and three special tokens."""
    words = {"<s>": 0, "</s>": 1, "<unk>": 2, **{f"w{at}": at for at in range(3, VOCAB)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def greedy(model, ids, steps, stop=1):
    for _ in range(steps):
        step = model(torch.tensor([ids])).logits[0, -1].argmax().item()
        if step == stop:
            break
        ids = [*ids, step]
    return ids


def test_is_greedy_whatever_the_model_is_used_to(llama, tokenizer):
    model = llama().train()
    expected = greedy(llama(), [5, 6, 7], 12)[3:]
    own = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=9.0, suppress_tokens=expected[:1])
    model.generation_config = own
    assert answer(model, tokenizer, "w5 w6 w7", 12) == tokenizer.decode(expected, skip_special_tokens=True)
    assert model.generation_config is own and model.training


def test_stops_at_the_models_own_end(llama, tokenizer):
    model = llama()
    first, second = greedy(model, [5, 6, 7], 2)[3:]
    assert first != second
    model.generation_config.eos_token_id = [second]
    assert answer(model, tokenizer, "w5 w6 w7", 12).split() == [f"w{first}"]


def test_the_chat_template_is_used_where_there_is_one(llama, tokenizer):
    plain = answer(llama(), tokenizer, "w9", 8)
    tokenizer.chat_template = "{% for m in messages %}w5 {{ m['content'] }} w6 {% endfor %}w7"
    expected = greedy(llama(), [5, 9, 6, 7], 8)[4:]
    assert answer(llama(), tokenizer, "w9", 8) == tokenizer.decode(expected, skip_special_tokens=True)
    assert answer(llama(), tokenizer, "w9", 8, chat=False) == plain


def test_what_cannot_be_answered(llama, tokenizer):
    with pytest.raises(FactorMixError, match="empty"):
        answer(llama(), tokenizer, "  ")
    with pytest.raises(FactorMixError, match="at least 1"):
        answer(llama(), tokenizer, "w5", 0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(FactorMixError, match="BertModel does not generate"):
        answer(BertModel(BertConfig(vocab_size=VOCAB, **sizes)), tokenizer, "w5")
