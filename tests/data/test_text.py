"""Every bad input is refused with the place and the remedy; every good one is read as documented."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from factormix.data.text import read_documents, task_texts
from factormix.run.errors import FactorMixError


def write(path: Path, content: str | bytes | list[object]) -> Path:
    if isinstance(content, list):
        content = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in content) + "\n"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_txt_documents_are_separated_by_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\ufeff\n\n one\nstill one\r\n \t\r\n\r\ntwo\n\n\n\nthree")
    documents = read_documents(path)
    assert documents.texts == [" one\nstill one", "two", "three"]
    assert (documents.name, documents.kind, len(documents)) == ("a", "text", 3)
    assert documents.records[1] == {"text": "two"}
    assert documents.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert str(documents) == "a: 3 text documents, 22 characters"


@pytest.mark.parametrize(
    ("lines", "kind", "texts"),
    [
        ([{"text": "a"}, "", {"text": "b", "id": 3}], "text", ["a", "b"]),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": 1}], "labelled", ["a", "b"]),
        (
            [{"prompt": "{} is in Peru.", "targets": ["Lima", "Cusco"]}, {"prompt": "Capital:", "targets": "Lima"}],
            "knowledge",
            ["Lima is in Peru.", "Capital: Lima"],
        ),
        ([{"messages": [{"role": "user", "content": "a"}, {"role": "b", "content": "c"}]}], "chat", ["user: a\nb: c"]),
    ],
)
def test_jsonl_kinds(tmp_path: Path, lines: list[object], kind: str, texts: list[str]) -> None:
    documents = read_documents(write(tmp_path / "a.jsonl", lines))
    assert (documents.kind, documents.texts) == (kind, texts)
    assert [record.keys() for record in documents.records] == [line.keys() for line in lines if isinstance(line, dict)]
    assert all(isinstance(record.get("targets", []), list) for record in documents.records)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "", ["empty"]),
        ("a.txt", " \n\t\n", ["empty"]),
        ("a.jsonl", "\n", ["empty"]),
        ("a.txt", b"abc\0def", ["binary", "byte 3"]),
        ("a.txt", "abc".encode("utf-16"), ["UTF-16", "byte 3"]),
        ("a.txt", b"ab\xffc", ["not UTF-8", "0xff", "offset 2"]),
        ("a.csv", "a,b", ["'.csv'", ".txt and .jsonl"]),
        ("a.jsonl", ['{"text": "a"}', "", '{"text": }'], ["line 3", "not JSON", "column 10"]),
        ("a.jsonl", ["[1]"], ["line 1", "list"]),
        ("a.jsonl", [{"txet": "a"}], ["line 1", "'txet'", "Did you mean 'text'?"]),
        ("a.jsonl", [{"prompt": "a", "target": "b"}], ["'target'", "Did you mean 'targets'?"]),
        ("a.jsonl", [{}], ["none"]),
        ("a.jsonl", [{"text": "a"}, {"text": "b", "label": 1}], ["line 2 is labelled", "text"]),
        ("a.jsonl", [{"text": 3}], ["'text' received 3"]),
        ("a.jsonl", [{"text": " "}], ["'text' received ' '"]),
        ("a.jsonl", [{"text": "a", "label": None}], ["'label' received None"]),
        ("a.jsonl", [{"text": "a", "label": True}], ["'label' received True"]),
        ("a.jsonl", [{"prompt": "a", "targets": []}], ["'targets' received []"]),
        ("a.jsonl", [{"prompt": "{} {}", "targets": ["b"]}], ["more than once"]),
        ("a.jsonl", [{"messages": []}], ["'messages' received []", "role and content"]),
        ("a.jsonl", [{"messages": [{"role": "user", "content": " "}]}], ["role and content"]),
        ("a.jsonl", [{"messages": [{"role": "user"}]}], ["role and content"]),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes | list[object], words: list[str]) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(FactorMixError) as caught:
        read_documents(path)
    assert all(word in str(caught.value) for word in [str(path), *words]), caught.value


def test_missing_files_and_directories(tmp_path: Path) -> None:
    write(tmp_path / "brown.txt", "x")
    with pytest.raises(FactorMixError, match=r"does not exist. Did you mean '.*brown.txt'"):
        read_documents(tmp_path / "brwn.txt")
    with pytest.raises(FactorMixError, match="does not exist"):
        read_documents([str(tmp_path / "gone" / "brwn.txt")])
    with pytest.raises(FactorMixError, match="is a directory"):
        read_documents(tmp_path)


def test_several_files(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one.txt", "a\n\nb"), write(tmp_path / "two.jsonl", [{"text": "c"}])
    both = read_documents([one, str(two)])
    assert (both.name, both.texts) == ("one+two", ["a", "b", "c"])
    assert both.sha256 != read_documents([two, one]).sha256
    assert read_documents([one]) == read_documents(one)
    labelled = write(tmp_path / "three.jsonl", [{"text": "c", "label": 1}])
    assert read_documents([one, labelled]).kind == "text"
    fact = write(tmp_path / "four.jsonl", [{"prompt": "a", "targets": ["b"]}])
    with pytest.raises(FactorMixError, match="one is text, four is knowledge"):
        read_documents([one, fact])


def test_strings_from_python(tmp_path: Path) -> None:
    documents = read_documents(["first document", " ", "second.txt\nis text"])
    assert documents.texts == ["first document", "second.txt\nis text"] and documents.kind == "text"
    assert read_documents(documents) is documents
    assert documents.sha256 != read_documents(["first documentsecond.txt\nis text"]).sha256
    path = write(tmp_path / "a.txt", "x")
    for wrong, words in (
        ([], "no text given"),
        (["  "], "all 1 documents given are empty"),
        ([3], "received 3"),
        ([path, "a document"], "mixes file names"),
    ):
        with pytest.raises(FactorMixError, match=words):
            read_documents(wrong)  # type: ignore[arg-type]


def test_a_chat_is_read_in_the_template_of_the_tokenizer(tmp_path: Path) -> None:
    chat = read_documents(write(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}]))
    template = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    vocabulary = Tokenizer(models.WordLevel({"hi": 0, "<s>": 1}, unk_token="hi"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, bos_token="<s>")
    with pytest.raises(FactorMixError, match="a holds 1 chats.*no chat template"):
        chat.plain(tokenizer)
    tokenizer.chat_template = template
    assert chat.plain(tokenizer) == ["<user>hi"]  # without BOS, which every window begins with
    tokenizer.chat_template = "{{ raise_exception('no users') }}"
    with pytest.raises(FactorMixError, match="refuses.*of a: no users"):
        chat.plain(tokenizer)
    tokenizer.chat_template = template
    both = read_documents([write(tmp_path / "b.txt", "some text"), tmp_path / "a.jsonl"])
    assert (both.kind, both.plain(tokenizer)) == ("text", ["some text", "<user>hi"])
    review = write(tmp_path / "c.jsonl", [{"text": "fine", "label": 1}])
    all_three = read_documents([review, tmp_path / "b.txt", tmp_path / "a.jsonl"])
    assert (all_three.kind, all_three.plain(tokenizer)) == ("text", ["fine", "some text", "<user>hi"])
    plain = read_documents(["any text"])
    assert plain.plain(tokenizer) == plain.texts


def test_a_task_is_read_with_its_answers(tmp_path):
    files = {
        "labelled": '{"text": "a b", "label": "yes"}\n{"text": "c", "label": "no"}\n',
        "choices": '{"text": "Which?", "choices": ["x", "y"], "label": 1}\n',
        "prompts": '{"prompt": "Paris is in {}.", "targets": ["France", "Europe"]}\n',
        "plain": '{"text": "only text"}\n',
    }
    read = {}
    for name, lines in files.items():
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        read[name] = task_texts(tmp_path / f"{name}.jsonl")
    assert read == {
        "labelled": ["a b\nyes", "c\nno"],
        "choices": ["Which?\ny"],
        "prompts": ["Paris is in France."],
        "plain": ["only text"],
    }


def test_a_document_longer_than_a_file_name_is_no_path():
    assert read_documents(["w " * 200, "b"]).texts == ["w " * 200, "b"]
