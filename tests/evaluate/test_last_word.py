"""Last-word accuracy: the passages cut, and greedy decoding as the judge."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from factormix.evaluate.last_word import Passage, _passages, cut_passages, last_words
from factormix.run.errors import FactorMixError
from tests.evaluate.tiny import VOCAB


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<s>", "<unk>", *(f"w{i}" for i in range(VOCAB - 2))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


def test_passages_are_whole_sentences_without_their_last_word():
    first, second = " ".join(["go"] * 40) + " home.", " ".join(["run"] * 30) + ' "far away!"'
    (found,) = _passages(f"{first}\n{second} {first}")
    assert found[1] == "away"
    assert found[0].startswith("go go") and found[0].endswith('run "far')
    assert _passages("too short.") == []
    assert _passages(" ".join(["endless"] * 200) + ".") == []  # no sentences there
    assert _passages(" ".join(["go"] * 70) + " 42.") == []  # a number is no word


def test_tokens_and_order(tokenizer):
    texts = [" ".join(f"w{(i * n) % 90}" for i in range(70)) + " end." for n in range(1, 9)]
    some = cut_passages(texts, tokenizer, tokens=200)
    assert len(some) == 3  # each is <s> and 71 words
    assert all(len(each.ids) == 72 and each.answer == 1 and each.ids[0] == 0 for each in some)
    assert cut_passages(texts, tokenizer, tokens=200) == some
    assert cut_passages(texts, tokenizer, tokens=200, seed=1) != some
    with pytest.raises(FactorMixError, match="0 passages of 60 words"):
        cut_passages(["w1 w2."], tokenizer)


def test_right_is_what_greedy_decoding_writes(llama):
    model = llama()
    generator = torch.Generator().manual_seed(0)
    passages, expected = [], []
    for length, answer, spoil in ((9, 1, None), (14, 3, None), (6, 2, -1), (11, 3, -3), (12, 2, -2)):
        prompt = torch.randint(1, VOCAB, (1, length), generator=generator)
        said = model.generate(prompt, max_new_tokens=answer, do_sample=False, eos_token_id=None)[0]
        if spoil is not None:
            said[spoil] = (said[spoil] + 1) % VOCAB
            for at in range(len(said) + spoil + 1, len(said)):  # what follows is the model's own: only one is wrong
                said[at] = model(said[None, :at]).logits[0, -1].argmax()
        passages.append(Passage(tuple(said.tolist()), answer))
        expected.append(0.0 if spoil else 1.0)
    assert last_words(model, passages).tolist() == expected


@torch.no_grad()
def test_a_training_model_is_judged_in_eval_mode_and_trains_on(llama):
    model = llama(attention_dropout=0.9)
    ids = torch.randint(1, VOCAB, (20, 8), generator=torch.Generator().manual_seed(0))
    said = model(ids).logits[:, -1].argmax(-1)  # (20,)
    passages = [Passage((*row, word), 1) for row, word in zip(ids.tolist(), said.tolist())]
    assert last_words(model.train(), passages).mean() == 1.0 and model.training


def test_a_word_that_changes_the_tokens_before_it_is_left_out():
    class Merging:
        """One id a word, but "end" melts into the word before it and leaves a rest, and "gone" has no id of its own."""

        bos_token_id = None

        def __call__(self, text, add_special_tokens):
            words = text.replace(" end", "+e nd").replace(" gone", "").split()
            return {"input_ids": [hash(word) for word in words]}

    texts = [" ".join(["go"] * 60) + f" {word}." for word in ("end", "home", "gone", "away", "end")]
    made = cut_passages(texts, Merging(), tokens=10_000)
    assert {each.ids[-1] for each in made} == {hash("home"), hash("away")}
    assert all(each.answer == 1 and len(each.ids) == 61 for each in made)
