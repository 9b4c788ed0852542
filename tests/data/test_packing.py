"""Windows: nothing padded, nothing lost in between, special tokens where they belong and never scored."""

from __future__ import annotations

import hashlib
import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from factormix.data.packing import evenly, pack
from factormix.run.errors import FactorMixError

SPECIAL = ["[UNK]", "<s>", "</s>", "[CLS]", "[SEP]"]
WORDS = [f"w{i}" for i in range(100)]
VOCABULARY = {word: i for i, word in enumerate([*SPECIAL, "a", *WORDS])}
BOS, EOS, CLS, SEP = (VOCABULARY[name] for name in SPECIAL[1:])


def tokenizer(template: str = "$A", maximum: int | None = None, **special: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that puts what `template` says around a text."""
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, VOCABULARY[name]) for name in SPECIAL]
    )
    extra = {} if maximum is None else {"model_max_length": maximum}
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **special, **extra)


def documents(*lengths: int) -> list[str]:
    """Documents of so many words, no word twice."""
    words = iter(WORDS)
    return [" ".join(next(words) for _ in range(length)) for length in lengths]


def ids(*numbers: int) -> list[int]:
    return [VOCABULARY[f"w{number}"] for number in numbers]


def test_one_stream_joined_by_eos_and_cut() -> None:
    packed = pack(documents(3, 5, 2), tokenizer(eos_token="</s>", bos_token="<s>"), window=4)
    assert packed.input_ids.tolist() == [[*ids(0, 1, 2), EOS], ids(3, 4, 5, 6), [*ids(7), EOS, *ids(8, 9)]]
    assert packed.scored.tolist() == [[True] * 3 + [False], [True] * 4, [True, False, True, True]]
    assert packed.tokens == 12 and len(packed) == 3
    assert packed.input_ids.dtype == torch.int64 and packed.scored.dtype == torch.bool
    assert torch.equal(packed.attention_mask, torch.ones(3, 4, dtype=torch.int64))
    assert packed.sha256 == hashlib.sha256(packed.input_ids.numpy().astype("<i8").tobytes()).hexdigest()


def test_without_eos_nothing_joins() -> None:
    packed = pack(documents(3, 4), tokenizer(), window=3)
    assert packed.input_ids.tolist() == [ids(0, 1, 2), ids(3, 4, 5)] and packed.scored.all()


@pytest.mark.parametrize(
    ("template", "bos", "expected"),
    [
        ("$A", None, [ids(0, 1, 2, 3)]),  # has a BOS and adds none: SmolLM2
        ("$A", True, [[BOS, *ids(0, 1, 2)], [BOS, *ids(3, 4, 5)]]),
        ("<s> $A", None, [[BOS, *ids(0, 1, 2)], [BOS, *ids(3, 4, 5)]]),  # adds one: Gemma
        ("<s> $A", True, [[BOS, *ids(0, 1, 2)], [BOS, *ids(3, 4, 5)]]),  # never two
        ("<s> $A", False, [ids(0, 1, 2, 3)]),
        ("[CLS] $A [SEP]", None, [[CLS, *ids(0, 1), SEP], [CLS, *ids(2, 3), SEP], [CLS, *ids(4, 5), SEP]]),  # BERT
        ("[CLS] $A [SEP]", True, [[CLS, *ids(0, 1), SEP], [CLS, *ids(2, 3), SEP], [CLS, *ids(4, 5), SEP]]),
    ],
)
def test_special_tokens_around_every_window(template: str, bos: bool | None, expected: list[list[int]]) -> None:
    packed = pack(documents(6), tokenizer(template, bos_token="<s>", cls_token="[CLS]"), window=4, bos=bos)
    assert packed.input_ids.tolist() == expected
    assert torch.equal(packed.scored, packed.input_ids > VOCABULARY["a"])


def test_seed_shuffles_documents_and_nothing_else() -> None:
    texts = documents(2, 2, 2, 2, 2)
    plain, one, again, other = (pack(texts, tokenizer(), window=2, seed=seed) for seed in (None, 1, 1, 2))
    assert plain.input_ids.flatten().tolist() == ids(*range(10))
    assert one.sha256 == again.sha256 and len({plain.sha256, one.sha256, other.sha256}) == 3
    assert sorted(one.input_ids.tolist()) == plain.input_ids.tolist()


class Counting:
    """Counts the characters a tokenizer is asked for."""

    def __init__(self, inner: PreTrainedTokenizerFast) -> None:
        self.inner, self.characters = inner, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def __call__(self, text: str | list[str], **options: object) -> object:
        self.characters += sum(map(len, [text] if isinstance(text, str) else text))
        return self.inner(text, **options)


@pytest.mark.parametrize("count", [1, 100, 10_000])
def test_no_more_is_tokenised_than_asked_for(count: int) -> None:
    """One huge document, or many: the same windows as from the whole, from a small part of it."""
    words = [f"w{(i * 7) % 100}" for i in range(100_000)]
    size = len(words) // count
    texts = [" ".join(words[i : i + size]) for i in range(0, len(words), size)]
    whole = pack(texts, tokenizer(eos_token="</s>"), window=16)
    counting = Counting(tokenizer(eos_token="</s>"))
    part = pack(texts, counting, window=16, tokens=1000)  # type: ignore[arg-type]
    assert part.tokens == 992  # whole windows
    assert torch.equal(part.input_ids, whole.input_ids[:62])
    assert counting.characters < 12_000 < sum(map(len, texts)) / 20


def test_a_long_document_without_spaces_still_packs() -> None:
    texts = ["\n".join(["w1"] * 5000), "w2" * 50_000, "w3 " * 20]
    assert pack(texts, tokenizer(), window=10, tokens=20).input_ids.flatten().tolist() == ids(1) * 20
    assert pack(texts[1:], tokenizer(), window=10, tokens=20).input_ids[0].tolist() == [0, *ids(3) * 9]


def test_long_documents_bring_no_warning_and_leave_the_tokenizer_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    short = tokenizer(maximum=8)
    assert pack(["w1 " * 50], short, window=8).tokens == 48
    assert short.model_max_length == 8 and not caplog.records


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 16}, ["1 documents give 10 tokens", "16 are needed", "1 windows of 16"]),
        ({"window": 4, "tokens": 16}, ["give 10 tokens", "16 are needed", "4 windows of 4"]),
        ({"window": 4, "tokens": 3}, ["tokens 3", "window of 4"]),
        ({"window": 0}, ["window 0", "no room"]),
        ({"window": 40}, ["window 40", "32 positions"]),
        ({"window": 4, "bos": True}, ["no BOS token", "bos=None"]),
    ],
)
def test_impossible_settings(options: dict, words: list[str]) -> None:
    with pytest.raises(FactorMixError) as caught:
        pack(documents(10), tokenizer(maximum=32), **options)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_window_of_special_tokens_only_is_refused() -> None:
    with pytest.raises(FactorMixError, match="2 special tokens"):
        pack(documents(10), tokenizer("[CLS] $A [SEP]"), window=2)


def test_several_sources_share_evenly_until_one_runs_out() -> None:
    long, short, tiny = ["a" * 100] * 50, ["b" * 10] * 200, ["c" * 10] * 3
    mixed = evenly([long, short, tiny], seed=0)
    assert sorted(mixed) == sorted([*long, *short, *tiny])  # nothing lost, nothing twice
    taken = "".join(mixed)[:3000]
    assert taken.count("c") == 30 and abs(taken.count("a") - taken.count("b")) <= 200
    order = list(range(200))
    random.Random(7).shuffle(order)
    assert evenly([[str(i) for i in range(200)]], seed=7) == [str(i) for i in order]  # one source: only shuffled
