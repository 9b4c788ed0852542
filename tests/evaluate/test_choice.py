"""Multiple choice: the local tasks as lm-eval gets them, and, where it is installed, its answers."""

import json
import sys

import pytest
import torch
import yaml

from factormix.assets.table import ASSETS
from factormix.evaluate import choice
from factormix.evaluate.choice import CORE_TASKS, answer_tasks, check_harness, local_tasks, read_task
from factormix.run.errors import FactorMixError
from tests.cli.tiny import save_tiny

QUESTIONS = [{"text": f"w{i} w{i + 1}", "choices": [f"w{i + 2}", "w70 w71", "w80"], "label": i % 3} for i in range(12)]


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)) + "\n", encoding="utf-8")
    return str(path)


def test_every_core_task_is_here_and_its_data_are_assets():
    assert set(CORE_TASKS) <= set(local_tasks())
    stems = {file.split(".")[0] for asset in ASSETS.values() for file in asset.files}
    for name in local_tasks():
        config = yaml.safe_load((choice._FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
        assert config["task"] == name and config["doc_to_text"]
        assert all(each.removeprefix("asset:") in stems for each in config["data"])


def test_a_task_file_becomes_questions(tmp_path, monkeypatch):
    lines = [{"text": f"text {i}", "label": ("negative", "positive")[i % 4 == 0]} for i in range(40)]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    monkeypatch.setattr("factormix.assets.fetch.fetch_named", lambda name, quiet: tmp_path / "r.jsonl")
    monkeypatch.setattr(choice, "_dataset", lambda questions: questions)
    config = read_task("reviews", limit=10)
    asked = config["custom_dataset"]()
    assert len(asked) == 10 and {each["label"] for each in asked} == {0, 1}
    assert asked[0]["choices"] == ["negative", "positive"]
    assert not {"data", "names"} & config.keys() and config["doc_to_choice"] == "choices"


def test_a_task_file_says_how_classes_are_called(tmp_path, monkeypatch):
    lines = [{"text": f"text {i}", "label": ("METHODS", "RESULTS")[i % 2]} for i in range(8)]
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    monkeypatch.setattr("factormix.assets.fetch.fetch_named", lambda name, quiet: tmp_path / "s.jsonl")
    monkeypatch.setattr(choice, "_dataset", lambda questions: questions)
    asked = read_task("pubmed-sections")["custom_dataset"]()
    assert {tuple(each["choices"]) for each in asked} == {("methods", "results")}


def test_a_file_gives_as_many_questions_as_are_asked_for(questions, monkeypatch):
    monkeypatch.setattr(choice, "_dataset", lambda questions: questions)
    some, others = (read_task(questions, limit=5, seed=seed)["custom_dataset"]() for seed in (0, 1))
    assert len(some) == 5 and all(each in QUESTIONS for each in some) and some != others


def test_other_names_are_left_to_the_harness():
    assert read_task("hellaswag") is None


def test_a_missing_harness_is_said_before_any_compute(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(FactorMixError, match=r"factormix\[tasks\]"):
        check_harness()


def test_the_harness_answers_as_the_log_likelihood_says(questions, tmp_path):
    pytest.importorskip("lm_eval")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save_tiny("llama", tmp_path / "llama")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = answer_tasks({"one": model}, tokenizer, [questions])["one"][questions]
    assert found.chance == pytest.approx(1 / 3) and len(found.right) == 12

    def likelihood(text, said):
        ids = torch.tensor([tokenizer(f"{text} {said}", add_special_tokens=False)["input_ids"]])
        length = len(tokenizer(said, add_special_tokens=False)["input_ids"])
        log_p = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        return float(log_p[-length:].sum()) / len(said)

    best = [max(range(3), key=lambda i: likelihood(q["text"], q["choices"][i])) for q in QUESTIONS]
    right = sum(b == q["label"] for b, q in zip(best, QUESTIONS))
    assert found.right.sum() == right
    skewed = tmp_path / "skewed.jsonl"
    lines = [{"text": f"w{i}", "choices": ["w3", "w4"], "label": int(i < 3)} for i in range(12)]
    skewed.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    found = answer_tasks({"one": model}, tokenizer, [str(skewed)])["one"][str(skewed)]
    assert found.chance == pytest.approx(9 / 12)  # of always saying w3
    with pytest.raises(FactorMixError, match="unknown task 'helaswag'"):
        answer_tasks({"one": model}, tokenizer, ["helaswag"])
