"""Reading text: .txt (documents separated by a blank line) and .jsonl (one JSON object a line).

Run it::

    documents = read_documents("brown-dev.txt")
    documents.texts[0]                # plain text
    str(documents)                    # "brown-dev: 50 text documents, 567,000 characters"

A .jsonl file is one of four kinds, found from its first line and the same on every line:

==========  =====================================================  =================================
kind        keys                                                   used as plain text
==========  =====================================================  =================================
text        ``{"text": str}``                                      the text
labelled    ``{"text": str, "label": str or int}``                 the text
knowledge   ``{"prompt": str, "targets": [str, ...]}``             the prompt with its first target
chat        ``{"messages": [{"role": str, "content": str} ...]}``  see `Documents.plain`
==========  =====================================================  =================================

In a knowledge prompt ``{}`` marks where the target goes; without it, the target follows the prompt after a space.
Other keys are kept in `Documents.records` and not used.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from factormix.run.errors import FactorMixError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["text", "labelled", "knowledge", "chat"]

_SUFFIXES = (".txt", ".jsonl")
_KEYS: dict[Kind, tuple[str, ...]] = {
    "knowledge": ("prompt", "targets"),
    "labelled": ("text", "label"),
    "text": ("text",),
    "chat": ("messages",),
}
_NEEDED = 'a line holds {"text"}, {"text", "label"}, {"prompt", "targets"} or {"messages"}'


@dataclass(frozen=True)
class Documents:
    """What was read.

    Attributes:
        name: the file's stem, several joined by "+"; "text" for strings from Python.
        kind: "text", "labelled", "knowledge" or "chat".
        texts: one plain text a document, never empty; of a chat, its messages as ``role: content``.
        records: one dict a document, as read; ``{"text": ...}`` for a .txt file.
        sha256: of the file (what `sha256sum` prints); of several, or of strings, of all their hashes in order.
    """

    name: str
    kind: Kind
    texts: list[str] = field(repr=False)
    records: list[dict[str, Any]] = field(repr=False)
    sha256: str

    def __len__(self) -> int:
        return len(self.texts)

    def plain(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The texts as a language model reads them: a chat in the tokenizer's own template, all others as they are.

        Raises:
            FactorMixError: a chat, and the tokenizer has no template, or its template refuses the messages.
        """
        chats = [_kind(record, self.name) == "chat" for record in self.records]
        if any(chats) and not tokenizer.chat_template:
            raise FactorMixError(
                f"{self.name} holds {sum(chats):,} chats, and {type(tokenizer).__name__} of this model has no chat "
                "template. Give plain text, or the chat model's own tokenizer."
            )
        return [
            _chat(record["messages"], tokenizer, self.name) if is_chat else text
            for record, text, is_chat in zip(self.records, self.texts, chats)
        ]

    def __str__(self) -> str:
        return f"{self.name}: {len(self):,} {self.kind} documents, {sum(map(len, self.texts)):,} characters"


def read_documents(source: str | Path | Documents | Sequence[str | Path]) -> Documents:
    """Read one file or several (facts by themselves, all other kinds together), or take documents given as strings.

    Args:
        source: a path, or a list of paths, or a list of strings. In a list, a string that ends in .txt or .jsonl or
            names an existing file is a path, any other is a document. `Documents` are returned as they are.

    Raises:
        FactorMixError: a file is missing, empty, binary, not UTF-8 (the byte offset is named), of another suffix, or
            holds a line that does not parse or lacks the keys (the line is named); or facts are mixed with other text.
    """
    if isinstance(source, Documents):
        return source
    if isinstance(source, str | Path):
        return _read_file(Path(source))
    return _join(read_parts(source))


def read_parts(source: Sequence[str | Path]) -> list[Documents]:
    """As `read_documents` reads a list, with each file's documents by themselves; strings are one part.

    Raises:
        FactorMixError: as there.
    """
    items = list(source)
    wrong = next((item for item in items if not isinstance(item, str | Path)), None)
    if wrong is not None:
        raise FactorMixError(f"text received {wrong!r} ({type(wrong).__name__}); give paths or strings.")
    if not items:
        raise FactorMixError("no text given; name at least one .txt or .jsonl file.")
    paths = [_is_path(item) for item in items]
    if all(paths):
        parts = [_read_file(Path(item)) for item in items]
        _refuse_facts_among_others(parts)
        return parts
    if any(paths):
        raise FactorMixError(
            f"text mixes file names ({items[paths.index(True)]!r}) and documents "
            f"({str(items[paths.index(False)])[:40]!r}); give one or the other."
        )
    texts = [text for text in map(str, items) if text.strip()]
    if not texts:
        raise FactorMixError(f"all {len(items)} documents given are empty.")
    digest = _sha256_of([hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() for text in texts])
    return [Documents("text", "text", texts, [{"text": text} for text in texts], digest)]


def task_texts(path: str | Path) -> list[str]:
    """A task's examples as plain text with their answers: what a model tailored to the task is to read and say.

    A labelled text is followed by its label on a line of its own, a question with choices by the right one; a prompt
    holds its first target; plain text is as it is.

    Raises:
        FactorMixError: as `read_documents`.
    """
    documents = read_documents(path)
    if documents.kind != "labelled":
        return documents.texts
    return [f"{record['text']}\n{_answer(record)}" for record in documents.records]


def _answer(record: dict[str, Any]) -> str:
    label, choices = record["label"], record.get("choices")
    return str(choices[label]) if isinstance(choices, list) and isinstance(label, int) else str(label)


def _is_path(item: str | Path) -> bool:
    if isinstance(item, Path):
        return True
    if "\n" in item or "\0" in item or len(item) > 1000:
        return False
    try:
        return item.endswith(_SUFFIXES) or Path(item).is_file()
    except OSError:  # longer than a file name may be
        return False


def _read_file(path: Path) -> Documents:
    if path.is_dir():
        raise FactorMixError(f"text {str(path)!r} is a directory; name a file in it.")
    if not path.exists():
        beside = (
            [str(file) for file in path.parent.glob("*") if file.suffix in _SUFFIXES] if path.parent.is_dir() else []
        )
        raise FactorMixError(f"text file {str(path)!r} does not exist.{nearest(str(path), beside)}")
    if path.suffix not in _SUFFIXES:
        raise FactorMixError(f"text file {str(path)!r} ends in {path.suffix!r}; allowed: .txt and .jsonl.")
    data = path.read_bytes()
    text = _decode(data, path)
    if not text.strip():
        raise FactorMixError(f"text file {str(path)!r} is empty; it must hold at least one document.")
    kind, records = _parse_jsonl(text, path) if path.suffix == ".jsonl" else ("text", _parse_txt(text))
    return Documents(path.stem, kind, [_plain(r, kind) for r in records], records, hashlib.sha256(data).hexdigest())


def _decode(data: bytes, path: Path) -> str:
    nul = data.find(b"\0")
    if nul >= 0:
        raise FactorMixError(f"text file {str(path)!r} is binary or UTF-16: NUL at byte {nul}. Save it as UTF-8 text.")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FactorMixError(
            f"text file {str(path)!r} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}. "
            "Convert it, for example with iconv -t UTF-8."
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _parse_txt(text: str) -> list[dict[str, Any]]:
    pieces = (piece.strip("\n") for piece in re.split(r"\n(?:[^\S\n]*\n)+", text))
    return [{"text": piece} for piece in pieces if piece.strip()]


def _parse_jsonl(text: str, path: Path) -> tuple[Kind, list[dict[str, Any]]]:
    kind: Kind | None = None
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{str(path)!r} line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise FactorMixError(f"{where} is not JSON: {error.msg} at column {error.colno}.") from error
        if not isinstance(record, dict):
            raise FactorMixError(f"{where} is a {type(record).__name__}; {_NEEDED}.")
        found = _kind(record, where)
        if kind is not None and found != kind:
            raise FactorMixError(f"{where} is {found}, the lines before it are {kind}; split the file by kind.")
        kind = found
        records.append(_checked(record, found, where))
    assert kind is not None  # the text is not empty
    return kind, records


def _kind(record: dict[str, Any], where: str) -> Kind:
    for kind, keys in _KEYS.items():
        if all(key in record for key in keys):
            return kind
    known = sorted({key for keys in _KEYS.values() for key in keys} - record.keys())
    hint = next((found for found in (nearest(key, known) for key in record) if found), "")
    raise FactorMixError(f"{where} has the keys {', '.join(map(repr, record)) or 'none'}; {_NEEDED}.{hint}")


def _checked(record: dict[str, Any], kind: Kind, where: str) -> dict[str, Any]:
    if kind == "chat":
        return _checked_chat(record, where)
    key = "prompt" if kind == "knowledge" else "text"
    if not isinstance(record[key], str) or not record[key].strip():
        raise FactorMixError(f"{where}: {key!r} received {record[key]!r} and needs a non-empty string.")
    if kind == "labelled" and (isinstance(record["label"], bool) or not isinstance(record["label"], str | int)):
        raise FactorMixError(f"{where}: 'label' received {record['label']!r} and needs a string or a whole number.")
    if kind == "knowledge":
        targets = [record["targets"]] if isinstance(record["targets"], str) else record["targets"]
        if not isinstance(targets, list) or not targets or not all(isinstance(t, str) and t.strip() for t in targets):
            raise FactorMixError(f"{where}: 'targets' received {record['targets']!r} and needs a list of strings.")
        if record["prompt"].count("{}") > 1:
            raise FactorMixError(f"{where}: 'prompt' holds {{}} more than once: {record['prompt']!r}.")
        record = {**record, "targets": targets}
    return record


def _checked_chat(record: dict[str, Any], where: str) -> dict[str, Any]:
    messages = record["messages"]
    good = isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)
    for key in ("role", "content"):
        good = good and all(isinstance(message.get(key), str) and message[key].strip() for message in messages)
    if not good:
        raise FactorMixError(
            f"{where}: 'messages' received {messages!r} and needs a list of objects with the strings role and content."
        )
    return record


def _chat(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program of its own, and raises what it likes
        raise FactorMixError(f"the chat template refuses {messages!r} of {name}: {error}") from error
    return text.removeprefix(tokenizer.bos_token or "")  # windows begin with it anyhow


def _plain(record: dict[str, Any], kind: Kind) -> str:
    if kind == "chat":
        return "\n".join(f"{message['role']}: {message['content']}" for message in record["messages"])
    if kind != "knowledge":
        return record["text"]
    prompt, target = record["prompt"], record["targets"][0]
    return prompt.replace("{}", target) if "{}" in prompt else f"{prompt} {target}"


def _refuse_facts_among_others(parts: list[Documents]) -> None:
    kinds = {part.kind for part in parts}
    if len(kinds) > 1 and "knowledge" in kinds:
        listed = ", ".join(f"{part.name} is {part.kind}" for part in parts)
        raise FactorMixError(f"facts go with no other kind of text: {listed}; give one kind at a time.")


def _join(parts: list[Documents]) -> Documents:
    if len(parts) == 1:
        return parts[0]
    kinds = {part.kind for part in parts}
    return Documents(
        "+".join(part.name for part in parts),
        "text" if len(kinds) > 1 else parts[0].kind,
        [text for part in parts for text in part.texts],
        [record for part in parts for record in part.records],
        _sha256_of([part.sha256 for part in parts]),
    )


def _sha256_of(hashes: list[str]) -> str:
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()
