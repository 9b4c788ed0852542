"""Documents to windows of token ids, each token with the piece of the text that it stands for.

    windows, whole = cut(["Where? Here."], tokenizer, window=512, tokens=512)
    "".join(token.gap + token.piece for token in windows[0].tokens)      # the text again

The pieces come from the tokenizer's offsets, so they are the text as it was written, even where the tokenizer lowers
case or drops spaces. A character that is cut into several tokens goes with the first of them, and all are marked.
Every document starts a window of its own, and what the tokenizer puts around a text is put around every window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from factormix.data.packing import around
from factormix.run.errors import FactorMixError

TokenKind = Literal["word", "word piece", "number", "punctuation", "space", "part of a character", "special"]
TOKEN_KINDS: tuple[TokenKind, ...] = get_args(TokenKind)
CHARACTERS_A_TOKEN = 40  # a beginning of this many characters nearly always gives its token; if not, all is read


@dataclass(frozen=True)
class Token:
    """One token as a reader sees it.

    Attributes:
        id: its number in the vocabulary.
        piece: the text it stands for, "" for a special token and for the later tokens of one character.
        gap: text between the token before and this one that no token holds.
        name: the vocabulary's own spelling, such as "[CLS]" or "Ġthe".
        kind: what it is made of; "word piece" goes on with a word, "word" begins one.
        document: which of the documents it is from, from 0.
    """

    id: int
    piece: str
    gap: str
    name: str
    kind: TokenKind
    document: int


@dataclass(frozen=True)
class Window:
    """The tokens that the model sees together."""

    tokens: tuple[Token, ...]

    @property
    def ids(self) -> list[int]:
        """The L token ids."""
        return [token.id for token in self.tokens]


def cut(texts: Sequence[str], tokenizer: Any, window: int, tokens: int) -> tuple[list[Window], bool]:
    """Cut documents into windows, from the first on, until there are `tokens` tokens, special ones included.

    Args:
        texts: the documents.
        tokenizer: a Hugging Face tokenizer. One without offsets (a slow one) gives decoded pieces instead of the text.
        window: most tokens of a window.
        tokens: most tokens of all windows together.

    Returns:
        The windows, and whether they hold all of the text.

    Raises:
        FactorMixError: `tokens` or `window` leaves no room for text, or no document has a token.
    """
    prefix, suffix = around(tokenizer, None)
    special = len(prefix) + len(suffix)
    if min(tokens, window) <= special:
        raise FactorMixError(
            f"tokens received {tokens}, in windows of {window}; {special} of every window are special tokens, so "
            f"allowed: at least {special + 1}."
        )
    windows: list[Window] = []
    left, whole = tokens, True
    for number, text in enumerate(texts):
        body = _read(text, tokenizer, number, left + 1)  # one more shows whether there is more
        while body and left > special:
            room = min(window, left) - special
            part, body = body[:room], body[room:]
            head = [_special(i, tokenizer, number) for i in prefix]
            tail = [_special(i, tokenizer, number) for i in suffix]
            windows.append(Window((*head, *part, *tail)))
            left -= len(part) + special
        if body:
            whole = False
            break
    if not windows:
        raise FactorMixError(f"none of the {len(texts)} documents has a token with this tokenizer; give other text.")
    return windows, whole


def _read(text: str, tokenizer: Any, document: int, wanted: int) -> list[Token]:
    """The tokens of one document, those beyond `wanted` perhaps left out; no more is tokenised than is needed."""
    beginning = text[: wanted * CHARACTERS_A_TOKEN]
    found = _tokenise(beginning, tokenizer, document)
    if len(found) < wanted and len(beginning) < len(text):
        found = _tokenise(text, tokenizer, document)
    return found


def _tokenise(text: str, tokenizer: Any, document: int) -> list[Token]:
    exact = bool(tokenizer.is_fast)
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=exact, verbose=False)
    ids: list[int] = list(coded["input_ids"])
    names = [str(name) for name in tokenizer.convert_ids_to_tokens(ids)]
    if not exact:
        return _decoded(ids, names, tokenizer, document)
    spans: list[tuple[int, int]] = [tuple(span) for span in coded["offset_mapping"]]
    tokens, end = [], 0  # `end`: all of the text before it is shown
    for at, (start, stop) in enumerate(spans):
        following = spans[at + 1][0] if at + 1 < len(spans) else len(text)
        shared = stop > start and (start < end or following < stop)  # with the token before, or the next one
        piece = text[max(start, end) : stop]
        kind = "part of a character" if shared else _kind(piece, text[start - 1 : start])
        tokens.append(Token(ids[at], piece, text[end:start], names[at], kind, document))
        end = max(end, stop)
    return tokens


def _decoded(ids: list[int], names: list[str], tokenizer: Any, document: int) -> list[Token]:
    """Pieces by decoding each token alone: what there is without offsets."""
    tokens, before = [], ""
    for number, name in zip(ids, names, strict=True):
        piece = str(tokenizer.decode([number]))
        kind = "part of a character" if "\ufffd" in piece else _kind(piece, before)
        tokens.append(Token(number, piece, "", name, kind, document))
        before = piece[-1:]
    return tokens


def _special(number: int, tokenizer: Any, document: int) -> Token:
    return Token(number, "", "", str(tokenizer.convert_ids_to_tokens([number])[0]), "special", document)


def _kind(piece: str, before: str) -> TokenKind:
    """What a piece is made of; `before` is the character before it."""
    bare = piece.strip()
    if not bare:
        return "space"
    if not any(letter.isalnum() for letter in bare):
        return "punctuation"
    if not any(letter.isalpha() for letter in bare):
        return "number"
    return "word piece" if piece[0].isalnum() and before.isalnum() else "word"


def renumbered(windows: Sequence[Window], first: int) -> list[Window]:
    """The same windows, their documents counted from `first`: for joining the windows of several texts."""
    return [Window(tuple(replace(t, document=t.document + first) for t in window.tokens)) for window in windows]
