"""The JSON of eval: its keys are a promise (docs/json.md)."""

import math

import pytest
import torch

from factormix.evaluate.choice import Answers
from factormix.evaluate.last_word import Passage
from factormix.evaluate.perplexity import TextScore
from factormix.evaluate.retention import TaskScore, pooled_retention
from factormix.evaluate.suite import Evaluation, answer_for, evaluate, evaluate_for
from factormix.run.errors import FactorMixError


def test_json_keys_are_exact(llama, windows):
    texts = {"brown": windows(seed=0), "foldoc": windows(seed=1)}
    made = evaluate(llama(1), llama(0), texts, in_domain=["brown"]).to_dict()
    keys = "schema_version predicts perplexity agreement tasks recall retention in_domain foreign mean_ratio"
    assert set(made) == set(keys.split())
    assert made["retention"] == {"all": None, "choice": None, "last_word": None} and made["tasks"] == {}
    assert made["schema_version"] == 1
    assert set(made["perplexity"]) == set(made["agreement"]) == {"brown", "foldoc"}
    for stem in texts:
        assert set(made["perplexity"][stem]) == {"base", "model", "ratio", "ratio_stderr", "tokens"}
        assert set(made["agreement"][stem]) == {"top1", "kl"}
        assert all(isinstance(value, float | int) for value in made["perplexity"][stem].values())
    assert (made["in_domain"], made["foreign"]) == (["brown"], ["foldoc"])
    assert set(made["mean_ratio"]) == {"all", "in_domain", "foreign"}


def test_keys_stay_without_a_base(llama, windows):
    made = evaluate(llama(), None, {"brown": windows()}).to_dict()
    assert set(made["perplexity"]["brown"]) == {"base", "model", "ratio", "ratio_stderr", "tokens"}
    assert made["perplexity"]["brown"]["ratio"] is None
    assert made["agreement"]["brown"] == {"top1": None, "kl": None}
    assert made["mean_ratio"] == {"all": None, "in_domain": None, "foreign": None}


def test_means_are_geometric_and_kept_apart():
    ratios = {"brown": 2.0, "foldoc": 3.0, "handbook": 12.0}
    texts = {stem: TextScore(tokens=10, windows=1, model=r, base=1.0, ratio=r) for stem, r in ratios.items()}
    means = Evaluation(texts, in_domain=("brown",)).to_dict()["mean_ratio"]
    assert means["all"] == pytest.approx(72 ** (1 / 3))
    assert means["in_domain"] == pytest.approx(2.0)
    assert means["foreign"] == pytest.approx(math.sqrt(36))


def test_methods_side_by_side(llama, windows):
    texts = {"brown": windows()}
    both = evaluate_for({"FactorMix": llama(1), "paper": llama(2)}, llama(0), texts)
    assert both["paper"] == evaluate(llama(2), llama(0), texts)
    assert both["FactorMix"] == evaluate(llama(1), llama(0), texts)
    assert both["paper"].texts["brown"].base == both["FactorMix"].texts["brown"].base


def test_answers_of_several_models_beside_the_base(llama, windows):
    """The base is asked once; its own answers are all right here, so retention is each model's accuracy."""
    base = llama(0)
    prompts = [torch.randint(1, 97, (1, 8), generator=torch.Generator().manual_seed(i)) for i in range(40)]
    said = [base.generate(p, max_new_tokens=1, do_sample=False, eos_token_id=None)[0] for p in prompts]
    passages = {"prose": [Passage(tuple(ids.tolist()), 1) for ids in said]}
    found = answer_for({"same": llama(0), "other": llama(1)}, base, passages)
    assert found["same"]["last-word prose"].to_dict()["base"] == 1.0
    both = evaluate_for({"same": llama(0), "other": llama(1)}, base, {"brown": windows()}, tasks=found)
    kept = both["same"].to_dict()["retention"]
    assert kept["last_word"]["retention"] == kept["all"]["retention"] == 1.0 and kept["choice"] is None
    other = both["other"].to_dict()
    assert other["retention"]["all"]["retention"] == pytest.approx(other["tasks"]["last-word prose"]["model"])
    assert other["tasks"]["last-word prose"]["model"] < 0.9


def test_choices_keep_their_chance_and_each_model_its_own_answers(llama, monkeypatch):
    right = {"model": [1.0, 0.0], "other": [0.0, 0.0], "dense base": [1.0, 1.0]}
    asked = []

    def pretend(models, tokenizer, tasks, limit, seed, quiet):
        asked.append((list(models), tasks, limit, seed))
        return {who: {name: Answers(torch.tensor(right[who]), 0.2) for name in tasks} for who in models}

    monkeypatch.setattr("factormix.evaluate.suite.answer_tasks", pretend)
    found = answer_for({"model": llama(1), "other": llama(2)}, llama(0), {}, ["fever"], object(), limit=7, seed=3)
    assert asked == [(["model", "other", "dense base"], ["fever"], 7, 3)]
    for who in ("model", "other"):
        task = found[who]["fever"]
        assert (task.kind, task.chance) == ("choice", 0.2)
        assert task.model.tolist() == right[who] and task.base.tolist() == right["dense base"]
    alone = answer_for({"model": llama(1)}, None, {}, ["fever"], object())
    assert alone["model"]["fever"].base is None


def test_each_kind_of_task_is_pooled_apart_with_the_seed_given(llama, windows):
    answers = torch.tensor([1.0] * 30 + [0.0] * 10)
    tasks = {
        "fever": TaskScore("choice", 0.1, answers, torch.ones(40)),
        "last-word a": TaskScore("last-word", 0.0, answers.flip(0), answers),
    }
    found = evaluate_for({"m": llama()}, llama(0), {"brown": windows()}, seed=5, tasks={"m": tasks})["m"]
    kept = found.to_dict()["retention"]
    for key, names in (("all", ["fever", "last-word a"]), ("choice", ["fever"]), ("last_word", ["last-word a"])):
        assert kept[key] == pooled_retention({name: tasks[name] for name in names}, 5).to_dict()
        assert kept[key]["tasks"] == names
    assert kept["all"]["interval"] != pooled_retention(tasks, 0).to_dict()["interval"]


def test_a_mean_of_texts_that_were_not_all_compared_is_none():
    texts = {
        "a": TextScore(tokens=10, windows=1, model=2.0, base=1.0, ratio=2.0),
        "b": TextScore(tokens=10, windows=1, model=2.0),
    }
    means = Evaluation(texts, in_domain=("a",)).to_dict()["mean_ratio"]
    assert means == {"all": None, "in_domain": 2.0, "foreign": None}


def test_unknown_or_missing_texts_are_errors(llama, windows):
    with pytest.raises(FactorMixError, match="in-domain text 'brwn'.*Did you mean 'brown'"):
        evaluate(llama(), None, {"brown": windows()}, in_domain=["brwn"])
    with pytest.raises(FactorMixError, match="no text"):
        evaluate(llama(), None, {})
