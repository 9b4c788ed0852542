"""Pieces: together they are the text, whatever the tokenizer does to it, and the model sees its own tokens."""

from __future__ import annotations

import pytest

from factormix.run.errors import FactorMixError
from factormix.show.pieces import Window, cut
from tests.show.vocabularies import WithoutOffsets, of_bytes, of_words

TEXT = "W1, w12  w3\n\tcafé 🙂日 </script>"


def text_of(windows: list[Window]) -> str:
    return "".join(token.gap + token.piece for window in windows for token in window.tokens)


@pytest.mark.parametrize("tokenizer", [of_bytes(), of_words()], ids=["bytes", "words"])
def test_the_pieces_are_the_text_and_the_ids_the_tokenizers_own(tokenizer) -> None:
    windows, whole = cut([TEXT], tokenizer, window=100, tokens=100)
    assert text_of(windows) == TEXT and whole
    assert [window.ids for window in windows] == [tokenizer(TEXT)["input_ids"]]


def test_a_character_of_several_tokens_goes_with_the_first() -> None:
    (window,), _ = cut(["aé🙂b"], of_bytes(), window=100, tokens=100)
    assert [token.piece for token in window.tokens] == ["a", "é", "", "🙂", "", "", "", "b"]
    part = "part of a character"
    assert [token.kind for token in window.tokens] == ["word", part, part, part, part, part, part, "word"]


def test_kinds_and_gaps_of_a_tokenizer_that_drops_spaces_and_case() -> None:
    (window,), _ = cut(["W1, w12345  w3"], of_words(), window=100, tokens=100)
    assert [(t.name, t.gap, t.piece, t.kind) for t in window.tokens] == [
        ("[CLS]", "", "", "special"),
        ("w1", "", "W1", "word"),
        (",", "", ",", "punctuation"),
        ("w12", " ", "w12", "word"),
        ("##3", "", "3", "number"),
        ("##4", "", "4", "number"),
        ("##5", "", "5", "number"),
        ("w3", "  ", "w3", "word"),
        ("[SEP]", "", "", "special"),
    ]


def test_kinds_of_a_tokenizer_of_bytes() -> None:
    (window,), _ = cut(["ab 7?\n"], of_bytes(), window=100, tokens=100)
    assert [token.kind for token in window.tokens] == [
        "word", "word piece", "space", "number", "punctuation", "space",
    ]  # fmt: skip


def test_without_offsets_the_pieces_are_decoded() -> None:
    windows, whole = cut(["ab é"], WithoutOffsets(of_bytes()), window=100, tokens=100)
    assert [token.piece for token in windows[0].tokens] == ["a", "b", " ", "\ufffd", "\ufffd"] and whole
    assert windows[0].tokens[-1].kind == "part of a character"


def test_long_documents_are_cut_into_windows_with_special_tokens_around_each() -> None:
    words = " ".join(f"w{i}" for i in range(10))
    windows, whole = cut([words, "w1 w2", "w3"], of_words(), window=6, tokens=100)
    assert [len(window.ids) for window in windows] == [6, 6, 4, 4, 3] and whole
    assert all(window.tokens[0].name == "[CLS]" and window.tokens[-1].name == "[SEP]" for window in windows)
    assert [window.tokens[0].document for window in windows] == [0, 0, 0, 1, 2]
    assert text_of(windows) == words + "w1 w2" + "w3"


@pytest.mark.parametrize(("tokens", "lengths"), [(14, [6, 6]), (15, [6, 6, 3]), (16, [6, 6, 4]), (19, [6, 6, 4, 3])])
def test_it_stops_at_the_number_of_tokens(tokens: int, lengths: list[int]) -> None:
    words = " ".join(f"w{i}" for i in range(10))
    windows, whole = cut([words, "w1 w2"], of_words(), window=6, tokens=tokens)
    assert [len(window.ids) for window in windows] == lengths and not whole


def test_exactly_all_of_the_text_is_whole_and_one_token_less_is_not() -> None:
    for special in (True, False):
        count = len(of_words(special)("w1 w2 w3")["input_ids"])
        assert cut(["w1 w2 w3"], of_words(special), 100, count)[1]
        assert not cut(["w1 w2 w3"], of_words(special), 100, count - 1)[1]


def test_no_more_is_tokenised_than_is_needed() -> None:
    inner, read = of_bytes(), []

    class Counting(WithoutOffsets):
        def __call__(self, text: str, **options: object) -> object:
            read.append(len(text))
            return super().__call__(text, **options)

    cut(["ab " * 100_000], Counting(inner), window=8, tokens=16)
    assert sum(read) < 1000


@pytest.mark.parametrize(("window", "tokens"), [(100, 2), (2, 100), (100, 0)])
def test_no_room_for_text_is_refused(window: int, tokens: int) -> None:
    with pytest.raises(FactorMixError, match=rf"tokens received {tokens}, in windows of {window}.*at least 3"):
        cut(["w1"], of_words(), window, tokens)


def test_a_text_without_tokens_is_refused() -> None:
    with pytest.raises(FactorMixError, match="none of the 1 documents has a token"):
        cut([" \u200b "], of_words(), 10, 10)
