"""`factormix adapt` and `predict`: the whole way, what is refused, and a kill in the middle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from factormix.run.directory import sha256
from tests.cli.test_resume import finish, kill_after, start
from tests.families import tiny_model
from tests.mix.toy import domains, examples

QUICK = "--epochs 12 --lr 0.01 --window 16 --quiet".split()
METRICS = ("seconds", "tokens", "peak_bytes", "params_trained", "metrics")


def write(path: Path, *, kind: str = "single-label", labels: bool = True, **options: Any) -> Path:
    made = examples(kind, **options)
    rows = [{**record, **({"choices": c} if made.choices else {})} for record, c in
            zip(made.records, made.choices or [None] * len(made))]  # fmt: skip
    if not labels:
        rows = [{key: value for key, value in row.items() if key != "label"} for row in rows]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def adapters(tmp_path: Path) -> str:
    return ",".join(str(folder) for folder in domains("llama", tmp_path / "adapters").values())


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return write(tmp_path / "train.jsonl", count=60)


def test_from_task_to_predictions(
    llama: Path, adapters: str, task: Path, tmp_path: Path, run: Callable[..., str]
) -> None:
    test = write(tmp_path / "test.jsonl", count=30, seed=2)
    said = run("adapt", llama, "--domains", adapters, "--task", task, "--shots", 8, "--test", test, "-o", "out",
               "--json", "adapt.json", *QUICK)  # fmt: skip
    result = json.loads(Path("adapt.json").read_text())
    assert result["schema_version"] == 1 and all(key in result for key in METRICS)
    metrics = result["metrics"]
    assert metrics["examples"] == {"train": 24, "dev": 24} and metrics["test"]["n"] == 30
    assert list(metrics["test"]["gates"]["mean"]) == ["ffn", "pubmed", "reviews"]
    assert "mean weights: ffn 1.000, pubmed" in said and "factormix predict --mix out" in said
    record = json.loads(Path("out/run.json").read_text())
    assert set(record["data"]) == {"train", "test", "pubmed", "reviews"}
    assert not Path("out.work").exists()

    said = run("predict", "--mix", "out", "--input", test, "-o", "said.jsonl", "--json", "p.json", "--quiet")
    lines = [json.loads(line) for line in Path("said.jsonl").read_text().splitlines()]
    assert len(lines) == 30 and all(sum(line["scores"].values()) == pytest.approx(1) for line in lines)
    right = sum(line["prediction"] == line["label"] for line in lines) / 30
    assert json.loads(Path("p.json").read_text())["metrics"]["accuracy"] == pytest.approx(right)
    assert right == pytest.approx(metrics["test"]["accuracy"]) and f"accuracy {right:.4g}" in said

    bare = write(tmp_path / "bare.jsonl", labels=False, count=30, seed=2)
    run("predict", "--mix", "out", "--input", bare, "-o", "bare-said.jsonl", "--quiet", "--batch-size", 1)
    again = [json.loads(line) for line in Path("bare-said.jsonl").read_text().splitlines()]
    assert [a["prediction"] for a in again] == [line["prediction"] for line in lines]


@pytest.mark.parametrize("kind", ["multi-label", "regression", "multiple-choice"])
def test_other_kinds(llama: Path, tmp_path: Path, kind: str, run: Callable[..., str]) -> None:
    data = write(tmp_path / "data.jsonl", kind=kind)
    run("adapt", llama, "--task", data, "--dev", data, "-o", "out", "--task-adapter", "none", *QUICK)
    assert "predictions; " in run("predict", "--mix", "out", "--input", data, "-o", "said.jsonl")
    first = json.loads(Path("said.jsonl").read_text().splitlines()[0])
    assert isinstance(first["prediction"], {"multi-label": list, "regression": float, "multiple-choice": str}[kind])


def test_prompts(llama: Path, tmp_path: Path, adapters: str, run: Callable[..., str]) -> None:
    rows = [{"prompt": f"w{i % 3} w{20 + i} {{}}", "targets": [f"w{60 + i % 3}"]} for i in range(24)]
    data = tmp_path / "prompts.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    run("adapt", llama, "--domains", adapters, "--task", data, "--dev", data, "-o", "out", *QUICK, "--epochs", 40)
    run("predict", "--mix", "out", "--input", data, "-o", "said.jsonl", "--max-new-tokens", 1)
    said = [json.loads(line) for line in Path("said.jsonl").read_text().splitlines()]
    assert sum(line["prediction"] in line["targets"] for line in said) > 20


def test_gates_and_mixes_load_in_every_command(
    llama: Path, adapters: str, text: Path, run: Callable[..., str], refused: Callable[..., str]
) -> None:
    words = "--tokens 2000 --window 32 --lr 0.05 --quiet".split()
    run("adapt", llama, "--domains", adapters, "--task", text, "--dev", text, "-o", "out", *words)
    score = ("eval", llama, "--text", text, "--tokens", 1024, "--window", 32, "--quiet", "--json", "e.json")

    def perplexity(*more: str) -> float:
        run(*score, *more)
        return float(json.loads(Path("e.json").read_text())["perplexity"]["words"]["model"])

    first, *_ = adapters.split(",")
    assert len({perplexity(), perplexity("--mix", "out"), perplexity("--adapter", first)}) == 3
    parts = [word for folder in adapters.split(",") for word in ("--adapter", folder)]
    gated = [*parts, "--gate", "out/gate"]
    assert perplexity(*gated) == perplexity("--mix", "out") != perplexity(*parts)
    for loaded in (["--mix", "out"], gated):
        run("generate", llama, "w1 w2", *loaded, "--max-new-tokens", "2", "--quiet")
        short = "--new-tokens 2 --repeats 1 --prefill 8 --quiet".split()
        run("bench", llama, "--against", llama, *loaded, *short, "--json", "b.json")
        runs = json.loads(Path("b.json").read_text())["runs"]
        assert {r["limit"] < 1 for r in runs if r["implementation"] == "factormix"} == {True}  # there is more to read
        run("show", llama, "--text", text, *loaded, "-o", "p.html", "--overwrite", "--quiet", "--json", "s.json")
        (site,) = json.loads(Path("s.json").read_text())["sites"]
        assert site["kind"] == "domains" and site["columns"] == ["pubmed", "reviews"]
    assert "names its own adapters" in refused(*score, "--mix", "out", "--adapter", first)
    assert "names its own adapters" in refused(*score, "--mix", "out", "--gate", "out/gate")
    assert "needs the adapters it weighs" in refused(*score, "--gate", "out/gate")
    assert "in this order; received pubmed." in refused(*score, "--adapter", first, "--gate", "out/gate")
    assert "has no gate.json" in refused(*score, *parts, "--gate", "out")
    assert "no task to predict" in refused("predict", "--mix", "out", "--input", "x.jsonl", "-o", "y.jsonl")


def test_recipe_and_dry_run(llama: Path, adapters: str, task: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {llama}\ntask: {task}\ndomains: [{adapters}]\nshots: 4\nout: out\n", encoding="utf-8")
    said = run("adapt", "--recipe", recipe, "--dry-run", "--task-adapter", "lora")
    assert "single-label: 12 examples to train on, 12 to choose on; task adapter lora" in said
    assert "sigmoid gates over pubmed, reviews" in said and not Path("out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--task train.jsonl -o out", "no development set received; give --dev FILE, or --shots K"),
        ("--task train.jsonl --shots 50 -o out", "50 training examples a class"),
        ("--task train.jsonl --shots 2 --task-adapter lorra -o out", "Did you mean 'lora'"),
        ("--task nothing.jsonl --shots 2 -o out", "'nothing.jsonl' does not exist"),
        ("--task train.jsonl --shots 2 --domains nowhere -o out", "nowhere"),
        ("--task train.jsonl --shots 2", "adapt needs MODEL, --task FILE and -o DIR"),
        ("--task train.jsonl --dev numbers.jsonl -o out", "train is single-label and numbers is regression"),
    ],
)
def test_refused(
    llama: Path, task: Path, tmp_path: Path, words: str, message: str, refused: Callable[..., str]
) -> None:
    write(tmp_path / "numbers.jsonl", kind="regression")
    assert message in refused("adapt", llama, *words.split())


def test_predict_refuses(
    llama: Path, task: Path, tmp_path: Path, run: Callable[..., str], refused: Callable[..., str]
) -> None:
    run("adapt", llama, "--task", task, "--shots", 2, "-o", "out", *QUICK, "--epochs", 1)
    assert "must be a .jsonl file" in refused("predict", "--mix", "out", "--input", task, "-o", "y.txt")
    assert "exists; choose another" in refused("predict", "--mix", "out", "--input", task, "-o", "train.jsonl")
    assert "has no task.json" in refused("predict", "--mix", "adapters", "--input", task, "-o", "y.jsonl")
    other = tmp_path / "other"
    from tests.cli.tiny import save_tiny

    save_tiny("llama", other)
    tiny_model("llama", seed=1).save_pretrained(other)
    message = refused("predict", "--mix", "out", "--model", other, "--input", task, "-o", "y.jsonl")
    assert "is not the base that 'out' was made from" in message


def test_killed_and_resumed(llama: Path, adapters: str, task: Path) -> None:
    def words(out: str, *more: str) -> list[str]:
        from tests.cli.test_resume import MAIN, sys

        flags = "--shots 8 --epochs 60 --save-steps 5 --window 16".split()
        command = ["adapt", str(llama), "--domains", adapters, "--task", str(task), "-o", out, *flags, *more]
        return [sys.executable, "-c", MAIN, *command]

    kill_after(start(words("killed")), Path("killed.work/stage2/checkpoint-10/trainer_state.json"))
    assert not Path("killed").exists()
    other = start(words("killed", "--seed", "1"))
    _, refusal = other.communicate(timeout=60)
    assert other.returncode == 2 and "seed was 0, is 1" in refusal
    assert "resuming after step" in finish(words("killed")) and not Path("killed.work").exists()
    finish(words("whole"))
    for name in ("head.safetensors", "gate/gate.safetensors", "task_adapter/task_adapter.safetensors"):
        assert sha256(f"killed/{name}") == sha256(f"whole/{name}")
