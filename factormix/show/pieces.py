"""Cut documents into windows of tokens, and give each token the piece of text that it stands for.

    windows, whole = cut(["Where? Here."], tokenizer, window=512, tokens=512)
    "".join(token.gap + token.piece for token in windows[0].tokens)      # gives the text again

The pieces come from the tokenizer's offsets, so they are the text as it was written, even if the tokenizer lowers case
or drops spaces. If a character is cut into several tokens, its text goes to the first of them, and all are marked.
Every document starts a new window, and every window gets the special tokens that the tokenizer puts around a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from factormix.data.packing import around
from factormix.run.errors import FactorMixError

TokenKind = Literal["word", "word piece", "number", "punctuation", "space", "part of a character", "special"]
TOKEN_KINDS: tuple[TokenKind, ...] = get_args(TokenKind)
CHARACTERS_A_TOKEN = 40  # so many characters nearly always give a token; if they do not, the whole text is tokenised


@dataclass(frozen=True)
class Token:
    """One token as a reader sees it.

    Attributes:
        id: its number in the vocabulary.
        piece: the text it stands for. It is "" for a special token and for the later tokens of one character.
        gap: text between the previous token and this one that belongs to no token.
        name: the vocabulary's own spelling, such as "[CLS]" or "Ġthe".
        kind: one of `TOKEN_KINDS`; "word" begins a word, and "word piece" continues one.
        document: number of the document it is from, counted from 0.
    """

    id: int
    piece: str
    gap: str
    name: str
    kind: TokenKind
    document: int


@dataclass(frozen=True)
class Window:
    """The tokens that one forward of the model reads together."""

    tokens: tuple[Token, ...]

    @property
    def ids(self) -> list[int]:
        """The L token ids."""
        return [token.id for token in self.tokens]


def cut(texts: Sequence[str], tokenizer: Any, window: int, tokens: int) -> tuple[list[Window], bool]:
    """Cut documents into windows, in order, until there are `tokens` tokens, special tokens included.

    Args:
        texts: the documents.
        tokenizer: a Hugging Face tokenizer. A slow one has no offsets, so its pieces are decoded tokens.
        window: the most tokens of one window.
        tokens: the most tokens of all windows together.

    Returns:
        The windows, and whether they contain all of the text.

    Raises:
        FactorMixError: `tokens` or `window` leaves no room for text, or no document gives a token.
    """
    prefix, suffix = around(tokenizer, None)
    special = len(prefix) + len(suffix)
    if min(tokens, window) <= special:
        raise FactorMixError(
            f"tokens received {tokens}, in windows of {window}; allowed: at least {special + 1}, because every window "
            f"has {special} special tokens."
        )
    windows: list[Window] = []
    left, whole = tokens, True
    for number, text in enumerate(texts):
        body = _read(text, tokenizer, number, left + 1)  # one token more shows whether text is left over
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
    """The first `wanted` tokens of one document, or more. It avoids tokenising all of a long text."""
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
    tokens, end = [], 0  # the text before `end` belongs to earlier tokens
    for at, (start, stop) in enumerate(spans):
        following = spans[at + 1][0] if at + 1 < len(spans) else len(text)
        shared = stop > start and (start < end or following < stop)  # True: a neighbouring token has the same character
        piece = text[max(start, end) : stop]
        kind = "part of a character" if shared else _kind(piece, text[start - 1 : start])
        tokens.append(Token(ids[at], piece, text[end:start], names[at], kind, document))
        end = max(end, stop)
    return tokens


def _decoded(ids: list[int], names: list[str], tokenizer: Any, document: int) -> list[Token]:
    """Pieces of a tokenizer without offsets: each token is decoded alone."""
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
    """The kind of a piece; `before` is the character before it, or ""."""
    bare = piece.strip()
    if not bare:
        return "space"
    if not any(letter.isalnum() for letter in bare):
        return "punctuation"
    if not any(letter.isalpha() for letter in bare):
        return "number"
    return "word piece" if piece[0].isalnum() and before.isalnum() else "word"


def renumbered(windows: Sequence[Window], first: int) -> list[Window]:
    """The same windows with documents counted from `first`, so that windows of several texts can be joined."""
    return [Window(tuple(replace(t, document=t.document + first) for t in window.tokens)) for window in windows]
