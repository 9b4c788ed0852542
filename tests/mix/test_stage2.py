"""Stage 2: it learns every kind of task, keeps what is frozen, keeps the best checkpoint, resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from factormix import FactorMixError
from factormix.data.text import read_documents
from factormix.mix.adapt_config import AdaptConfig
from factormix.mix.examples import LabelledBatches, by_example, collate, encode, read_examples
from factormix.mix.load import load_mix, save_mix
from factormix.mix.score import example_logits, score_examples
from factormix.mix.stage2 import adapt, choose_examples, task_of
from factormix.mix.task import Task
from factormix.run.workdir import WorkDirectory
from factormix.train import loop
from tests.families import tiny_model
from tests.mix.toy import FAMILIES, LABELLED, QUICK, domains, examples


@pytest.mark.parametrize("family", FAMILIES)
def test_learns_a_separable_task_and_changes_nothing_frozen(family: str, tmp_path: Path, words: Any) -> None:
    model, folders = tiny_model(family), domains(family, tmp_path)
    before = {n: p.clone() for n, p in model.named_parameters()}
    train = examples(count=48)
    config = QUICK.replace(epochs=80, reduction=2)
    mix, task, done = adapt(model, folders, train, train, config, words, quiet=True)  # best on what it learned
    history = [step["task"] for step in done["metrics"]["history"]]
    assert sum(history[-6:]) < 0.5 * sum(history[:6])
    encoded = encode(train, words, task)
    found = score_examples(mix, encoded, train.labels or [], task, 0, 8)
    assert (
        found["accuracy"] > 0.9 and found["f1_macro"] > 0.9
    )  # chosen in bfloat16 where the CPU has it, told in float32
    assert done["params_trained"] == sum(done["metrics"]["parameters"].values())
    mix.assert_trainable(False, "afterwards")
    after = {n.replace("mixda_", "").replace("base_layer.", ""): p for n, p in model.named_parameters()}
    kept = {n: p for n, p in before.items() if n in after}
    assert len(kept) > len(before) / 2 and all(torch.equal(p, after[n]) for n, p in kept.items())
    assert any(gate.weight.abs().max() > 0 for gate in mix.gates.values())
    for name, value in found["gates"]["mean"].items():
        assert name in ("ffn", "pubmed", "reviews") and 0 < value < 2


@pytest.mark.parametrize("kind", LABELLED)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_every_kind_learns_and_predicts_the_same_after_loading(
    family: str, kind: str, tmp_path: Path, words: Any
) -> None:
    folders = domains(family, tmp_path)
    train, dev = examples(kind, 48), examples(kind, 24, seed=1)
    mix, task, done = adapt(tiny_model(family), folders, train, dev, QUICK.replace(epochs=20), words, quiet=True)
    history = [step["task"] for step in done["metrics"]["history"]]
    assert sum(history[-6:]) < sum(history[:6]) and task.metric in done["metrics"]["dev"]
    save_mix(mix, task, folders, tmp_path / "out")
    again, same = load_mix(tmp_path / "out", tiny_model(family))
    assert same == task
    encoded = encode(dev, words, task)
    logits = example_logits(mix, encoded, task, 0, 8)
    assert torch.equal(example_logits(again, encoded, task, 0, 8), logits)
    assert done["metrics"]["dev"]["loss"] == pytest.approx(
        score_examples(again, encoded, dev.labels, task, 0, 8)["loss"]
    )
    one_by_one = example_logits(again, encoded, task, 0, 1)  # defect 5: batches of one
    assert one_by_one.shape == logits.shape and torch.allclose(one_by_one, logits, atol=1e-5)
    assert len(task.predict(logits)) == len(task.scores(logits, dev.choices)) == len(dev)


@pytest.mark.parametrize("kind", ["pfeiffer", "houlsby", "lora", "prefix", "none"])
def test_every_task_adapter_trains_saves_and_loads(kind: str, tmp_path: Path, words: Any) -> None:
    folders = domains("llama", tmp_path)
    config = QUICK.replace(task_adapter=kind, epochs=3, reduction=4, lora_rank=2, prefix_tokens=3)
    train = examples(count=24)
    mix, task, done = adapt(tiny_model("llama"), folders, train, train, config, words, quiet=True)
    save_mix(mix, task, folders, tmp_path / "out")
    again, _ = load_mix(tmp_path / "out", tiny_model("llama"))
    encoded = encode(train, words, task)
    assert torch.equal(example_logits(mix, encoded, task, 0, 8), example_logits(again, encoded, task, 0, 8))
    assert (tmp_path / "out" / "task_adapter").exists() == (kind != "none")
    assert (done["metrics"]["parameters"]["task_adapter"] > 0) == (kind != "none")


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_peft_reads_its_own_task_adapter(kind: str, tmp_path: Path, words: Any) -> None:
    config = QUICK.replace(task_adapter=kind, epochs=2)
    mix, task, _ = adapt(tiny_model("llama"), {}, examples(), examples(), config, words, quiet=True)
    save_mix(mix, task, {}, tmp_path / "out")
    alone = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "out" / "task_adapter")).eval()
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        mix.head = None
        assert torch.allclose(alone(input_ids=ids, attention_mask=torch.ones_like(ids)).logits,
                              mix(ids, torch.ones_like(ids)), atol=1e-5)  # fmt: skip


def prompts(path: Path, count: int = 40) -> Path:
    rows = [{"prompt": f"w{i % 5} w{10 + i} {{}}", "targets": [f"w{50 + i % 5}"]} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_prompts_with_targets(tmp_path: Path, words: Any) -> None:
    folders, train = domains("llama", tmp_path), read_examples(prompts(tmp_path / "prompts.jsonl"))
    config = QUICK.replace(epochs=80, reduction=2)
    mix, task, done = adapt(tiny_model("llama"), folders, train, train, config, words, quiet=True)
    assert task.kind == "causal-lm" and mix.head is None
    assert done["metrics"]["dev"]["perplexity"] < 5 < 99  # of a vocabulary of 99
    save_mix(mix, task, folders, tmp_path / "out")
    assert not (tmp_path / "out" / "head.safetensors").exists()
    again, _ = load_mix(tmp_path / "out", tiny_model("llama"))
    ids = torch.arange(5, 12)[None]
    assert torch.equal(mix(ids, torch.ones_like(ids)), again(ids, torch.ones_like(ids)))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_plain_text_trains_the_gates_alone(family: str, tmp_path: Path, words: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(" ".join(f"w{(i * j) % 90}" for j in range(60)) for i in range(1, 40)), encoding="utf-8"
    )
    folders, documents = domains(family, tmp_path), read_documents(text)
    config = AdaptConfig(tokens=3000, window=32, batch_size=2, lr=0.05, gate_kind="softmax")
    mix, task, done = adapt(tiny_model(family), folders, documents, documents, config, words, quiet=True)
    assert task.kind == "text" and all(".gate." in name for name in mix.trained)
    history = [step["task"] for step in done["metrics"]["history"]]
    assert sum(history[-10:]) < sum(history[:10])
    with pytest.raises(FactorMixError, match="'lora' received for plain text"):
        adapt(tiny_model(family), folders, documents, documents, config.replace(task_adapter="lora"), words, quiet=True)


def test_shots_are_drawn_and_the_dev_set_is_disjoint() -> None:
    train, dev = choose_examples(examples(count=60), None, AdaptConfig(shots=4))
    assert len(train) == len(dev) == 12 and not set(train.texts) & set(dev.texts)  # type: ignore[union-attr]
    with pytest.raises(FactorMixError, match="no development set.*--shots"):
        choose_examples(examples(), None, AdaptConfig())
    with pytest.raises(FactorMixError, match="toy is single-label and toy is regression"):
        choose_examples(examples(), examples("regression"), AdaptConfig())


def test_unseen_labels_in_dev_are_refused(tmp_path: Path, words: Any) -> None:
    train = examples(count=24)
    few = train.take([i for i, label in enumerate(train.labels or ()) if label != "c"])
    with pytest.raises(FactorMixError, match=r"has the labels \['c'\], which the training"):
        adapt(tiny_model("llama"), {}, few, train, QUICK, words, quiet=True)


def test_the_best_checkpoint_is_kept(tmp_path: Path, words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([4.0, 3.0, 1.0, 2.0, 5.0, 1.5])  # of the start, of four epochs, and of the one that is kept

    def score(mix: Any, *_: Any) -> dict[str, Any]:
        seen.append(mix.trained_tensors())
        return {"loss": next(losses), "accuracy": 0.5}

    seen: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr("factormix.mix.stage2.score_examples", score)
    mix, _, done = adapt(tiny_model("bert"), {}, examples(), examples(), QUICK.replace(epochs=4), words, quiet=True)
    assert (done["metrics"]["best_step"], done["metrics"]["dev"]["loss"]) == (12, 1.5)
    assert all(torch.equal(tensor, seen[2][name]) for name, tensor in seen[5].items())
    kept = mix.trained_tensors()
    assert all(torch.equal(kept[name], seen[2][name]) for name in kept)
    assert any(not torch.equal(kept[name], seen[4][name]) for name in kept)


def test_a_killed_run_goes_on_and_ends_the_same(tmp_path: Path, words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = domains("bert", tmp_path)
    config = QUICK.replace(epochs=5, save_steps=4)  # 6 steps an epoch

    def run(work: Path | None) -> dict[str, torch.Tensor]:
        directory = None if work is None else WorkDirectory(work, {})
        mix, _, _ = adapt(
            tiny_model("bert"), folders, examples(), examples(seed=1), config, words, work=directory, quiet=True
        )
        return mix.trained_tensors()

    want = run(None)
    step_end = loop._Progress.on_step_end

    def dies(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step_end(self, args, state, control, **kwargs)
        if state.global_step == 15:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop._Progress, "on_step_end", dies)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "work")
    saved = tmp_path / "work" / "stage2" / "checkpoint-12"
    assert saved.is_dir()
    sizes = sum(file.stat().st_size for file in saved.glob("model*.safetensors"))
    assert sizes < 60_000  # what trains, not the whole model
    found = run(tmp_path / "work")
    assert want.keys() == found.keys() and all(torch.equal(want[name], found[name]) for name in want)


def test_batches_of_unlike_numbers_of_choices() -> None:
    logits = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]])
    table = by_example(logits, torch.tensor([2, 3]))
    assert table.tolist() == [[1.0, 2.0, -math.inf], [3.0, 4.0, 5.0]]
    task = Task("multiple-choice")
    assert task.predict(table) == [1, 2] and task.loss(table, torch.tensor([1, 2])).isfinite()


def test_every_example_comes_once_an_epoch(words: Any) -> None:
    task = Task("single-label", ("a", "b", "c"))
    encoded = encode(examples(count=10), words, task)
    batches = LabelledBatches(encoded, task, 0, 4, 3, 0)
    assert len(batches) == 9 and batches.steps_per_epoch == 3
    for epoch in range(3):
        rows = [tuple(r[m.bool()].tolist()) for i in range(3) for b in [batches[3 * epoch + i]]
                for r, m in zip(b["input_ids"], b["attention_mask"])]  # fmt: skip
        assert sorted(rows) == sorted(tuple(e.rows[0]) for e in encoded)
    assert batches[0]["input_ids"].shape == (4, max(len(r) for r in batches[0]["input_ids"]))


def test_long_texts_are_cut_but_never_a_choice(words: Any) -> None:
    source = examples("multiple-choice", 4)
    long = source.take(range(4))
    long.texts[:] = [" ".join(["w9"] * 50)] * 4
    task = Task("multiple-choice", window=12)
    for example, choices in zip(encode(long, words, task), long.choices or ()):
        for row, choice in zip(example.rows, choices):
            assert len(row) == 12 and words.decode(row[-1:]) == choice
    assert collate(encode(long, words, task), task, 0)["input_ids"].shape[1] == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shots": 0}, "shots received 0; allowed: at least 1"),
        ({"task_adapter": "pfeifer"}, "Did you mean 'pfeiffer'"),
        ({"gate_kind": "linear"}, "allowed: 'sigmoid', 'softmax', 'paper'"),
    ],
)
def test_impossible_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FactorMixError, match=message):
        AdaptConfig(**change)


def test_a_task_of_one_class_or_of_equal_targets() -> None:
    model: PreTrainedModel = tiny_model("bert")
    one = examples(count=9).take([0, 3, 6])
    with pytest.raises(FactorMixError, match="a task needs two or more classes"):
        task_of(model, one, QUICK)
    equal = examples("regression", 9).take([0, 3, 6])
    with pytest.raises(FactorMixError, match="every target is 0"):
        task_of(model, equal, QUICK)
