"""Questions from labelled and plain text."""

import json
from collections import Counter

import pytest

from factormix.assets.convert_bigbench import CHOICE_TASKS, convert_choices
from factormix.assets.convert_questions import _split, convert_mmlu, convert_reuters
from factormix.assets.fetch import source_of
from factormix.data.labelled import read_labelled
from factormix.data.questions import from_labels, next_sentences
from factormix.run.errors import FactorMixError


@pytest.fixture
def examples(tmp_path):
    lines = [{"text": f"text {i}", "label": "abcde"[0 if i < 60 else i % 5]} for i in range(100)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return read_labelled(tmp_path / "x.jsonl")


def test_classes_are_asked_in_turn_and_the_right_one_is_among_them(examples):
    names = {label: label.upper() for label in "abcde"}
    found = from_labels(examples, names, offered=3, count=30)
    right = Counter(each["choices"][each["label"]] for each in found)
    assert right == {letter: 6 for letter in "ABCDE"}  # though 68 of 100 texts are of class a
    label = dict(zip(examples.texts, examples.labels))
    assert all(each["choices"][each["label"]] == names[label[each["text"]]] for each in found)
    assert all(len(set(each["choices"])) == 3 for each in found)
    assert {each["label"] for each in found} == {0, 1, 2}
    assert from_labels(examples, names, offered=3, count=30) == found


def test_all_classes_in_one_order_and_a_name_for_each(examples):
    assert all(each["choices"] == list("abcde") for each in from_labels(examples))
    with pytest.raises(FactorMixError, match="label 'c'"):
        from_labels(examples, {"a": "A", "b": "B"})


def test_next_sentences_come_from_after_the_context():
    sentences = [f"Sentence {i} tells the reader of a thing that happened then and there." for i in range(60)]
    text = " ".join(sentences)
    found = next_sentences([text], count=8)
    assert len(found) == 8
    for each in found:
        assert f"{each['text']} {each['choices'][each['label']]}" in text
        assert len(set(each["choices"])) == 4 and 40 <= len(each["text"].split()) < 60
    with pytest.raises(FactorMixError, match="0 sentences"):
        next_sentences(["Short."], count=2)


def test_conversions(tmp_path):
    table = tmp_path / "x" / "datasets"
    table.mkdir(parents=True)
    rows = 'Category\tText\nd\tstring\nclass\t\ngrain\twheat "rose\ncocoa\tleft out\nship\tbulk carriers\n'
    for part in ("train", "test"):
        (table / f"reuters-r8-{part}.tab").write_text(rows, encoding="utf-8")
    convert_reuters([tmp_path / "x"], tmp_path)
    assert read_labelled(tmp_path / "reuters-test.jsonl").labels == ["grain", "ship"]
    folder = tmp_path / "y" / "mmlu" / "flan_cot_fewshot"
    folder.mkdir(parents=True)
    sample = 'doc_to_text: !function utils.text\nfewshot_config:\n  samples:\n  - question: "Find x (A).\\n(A) 0 (B) 3'
    (folder / "mmlu_abstract_algebra.yaml").write_text(
        sample + ' (C) a (D) 30"\n    target: "Think. The answer is (C)."\n', encoding="utf-8"
    )
    convert_mmlu([tmp_path / "y"], tmp_path)
    asked = read_labelled(tmp_path / "mmlu-dev.jsonl", kind="multiple-choice")
    assert (asked.texts, asked.choices, asked.labels) == (["Find x (A)."], [["0", "3", "a", "30"]], [2])
    assert _split("Which? (A) one two (B) b (C) c (D) d e") == ("Which?", ["one two", "b", "c", "d e"])


def test_bigbench_questions_have_one_right_choice(tmp_path):
    for task in CHOICE_TASKS.values():
        folder = tmp_path / "benchmark_tasks" / task
        folder.mkdir(parents=True)
        examples = [
            {"input": "Which? ", "target_scores": {"a": 0, "b": 1, "c": 0}},
            {"input": "Both?", "target_scores": {"a": 1, "b": 1}},
        ]
        (folder / "task.json").write_text(json.dumps({"examples": examples}), encoding="utf-8")
    convert_choices([tmp_path], tmp_path)
    asked = read_labelled(tmp_path / "wikihow-goal.jsonl", kind="multiple-choice")
    assert (asked.texts, asked.choices, asked.labels) == (["Which?"], [["a", "b", "c"]], [1])


def test_parts_of_one_collection_have_one_source():
    assert source_of("brown-train") == source_of("brown-heldout") != source_of("foldoc-test")
    assert source_of("pubmed-train") == source_of("pubmed-sections-test")
    assert source_of("mine-train") == source_of("mine-test") == "mine"
