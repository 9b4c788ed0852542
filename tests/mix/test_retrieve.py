"""Retention text by retrieval: the passages that an encoder finds nearest stand beside the knowledge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from factormix import FactorMixError
from factormix.data.packing import Packed
from factormix.mix.batches import Stage1Batches, fact_of, fact_rows
from factormix.mix.retrieve import TextEncoder, nearest
from factormix.run.workdir import WorkDirectory
from tests.cli.tiny import save_tiny
from tests.families import tiny_model

TOPICS = [f"w{10 * i} w{10 * i + 1} w{10 * i + 2}" for i in range(6)]  # no word in two of them
ORDER = [4, 1, 5, 0, 2, 3]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(save_tiny("bert-base", tmp_path_factory.mktemp("model")))


def packed(words: PreTrainedTokenizerBase, topics: list[str]) -> Packed:
    """A window of each topic, its words again and again."""
    ids = torch.tensor([words.convert_tokens_to_ids((topic.split() * 10)[:20]) for topic in topics])
    return Packed(ids, torch.ones_like(ids).bool(), ids.numel(), "")


def batches(words: PreTrainedTokenizerBase) -> Stage1Batches:
    """General windows of one topic each; knowledge of one topic each, turned round, in another order; and facts."""
    turned = [" ".join(TOPICS[i].split()[::-1]) for i in ORDER]
    said = [(TOPICS[i].split() * 10)[:20] for i in ORDER]
    facts = [fact_of(f"{' '.join(each[:17])} {{}}", " ".join(each[17:]), words, 32) for each in said]
    rows = [row for fact in facts for row in fact_rows([fact], 32, 0, 0)]
    return Stage1Batches(packed(words, turned), rows, packed(words, TOPICS), 20)


def encoder(words: PreTrainedTokenizerBase) -> TextEncoder:
    return TextEncoder(tiny_model("bert-base"), words)


def topic(ids: torch.Tensor, words: PreTrainedTokenizerBase) -> int:
    """Which topic most of a row's words are of."""
    said = words.decode(ids, skip_special_tokens=True).split()
    return max(range(len(TOPICS)), key=lambda i: sum(word in TOPICS[i].split() for word in said))


def test_the_nearest_passages_are_chosen(words: PreTrainedTokenizerBase) -> None:
    made = batches(words)
    assert made.beside == [*range(6), *range(6)]  # at random: whatever stands there
    made.beside = nearest(made, words, lambda: encoder(words), quiet=True)
    assert made.beside[:6] == ORDER and len(made.beside) == 12
    for i in range(len(made)):
        assert topic(made[i]["input_ids"][0], words) == topic(made[i]["general_ids"][0], words)
    assert bool(made[11]["structured"]) and made[11]["general_ids"].shape == (1, 20)


def test_only_knowledge_that_has_general_text_beside_it_looks_for_passages(words: PreTrainedTokenizerBase) -> None:
    whole = batches(words)
    made = Stage1Batches(whole.windows, [], whole.general, 20, length=16, old_every=4)  # six windows, read again
    made.beside = nearest(made, words, lambda: encoder(words), quiet=True)
    assert made.beside == [ORDER[0], ORDER[4], ORDER[8 % 6], ORDER[12 % 6]]
    for i in range(16):
        assert ("general_ids" in made[i]) == (i % 4 == 0)
        if i % 4 == 0:
            assert topic(made[i]["input_ids"][0], words) == topic(made[i]["general_ids"][0], words)


def test_the_search_is_exact_and_padding_does_not_matter(words: PreTrainedTokenizerBase) -> None:
    encode, texts = encoder(words), [TOPICS[0], " ".join(TOPICS), TOPICS[3]]
    together = encode(texts)
    assert torch.allclose(together.norm(dim=1), torch.ones(3))
    for i, text in enumerate(texts):
        assert torch.allclose(encode([text])[0], together[i], atol=1e-5)
    long = encode([" ".join(["w5"] * 5000)])  # cut to the model's positions
    assert long.isfinite().all()


def test_vectors_are_computed_once(tmp_path: Path, words: PreTrainedTokenizerBase) -> None:
    made, calls = batches(words), []

    def counted() -> TextEncoder:
        calls.append(1)
        return encoder(words)

    work = WorkDirectory(tmp_path / "w", {})
    first = nearest(made, words, counted, work=work, quiet=True)
    assert nearest(made, words, counted, work=WorkDirectory(tmp_path / "w", {}), quiet=True) == first
    assert len(calls) == 1


def test_an_encoder_decoder_is_refused(words: PreTrainedTokenizerBase) -> None:
    with pytest.raises(FactorMixError, match="a retriever needs one stack"):
        TextEncoder(tiny_model("t5-plain"), words)
