"""The commands from end to end on a tiny model: what they print, write and put into JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import factormix
from factormix.cli.recipe import Recipe
from factormix.evaluate.shapes import SHAPES
from factormix.factor.config import FactorConfig
from factormix.factor.factorize import factorize
from factormix.run.directory import sha256
from tests.cli.tiny import CUT, save_tiny

Run = Callable[..., str]


def read(path: Path | str) -> dict:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def test_factor(run: Run, llama: Path, text: Path) -> None:
    said = run("factor", llama, "-o", "out", "--text", text, "--json", "out.json", "--seed", 3, *CUT)
    result = read("out.json")
    assert result.keys() == {"schema_version", "seconds", "tokens", "peak_bytes", "params_trained", "metrics"}
    assert result["tokens"] == 1024 and result["seconds"] > 0 and result["peak_bytes"] > 2**20
    assert 0 < result["metrics"]["recall"] <= 1 and result["metrics"]["error_after"] < result["metrics"]["error_before"]

    model = factormix.load("out")
    assert result["metrics"]["parameters"] == model.num_parameters() and f"{model.num_parameters():,}" in said
    assert result["params_trained"] == sum(p.numel() for f in model.sparse_ffns().values() for p in f.parameters())

    run("factor", llama, "-o", "closed", "--text", text, "--json", "out.json", "--fit-passes", 0, *CUT)
    names = ("router.weight", "shared.down_proj.weight", "experts.down_proj")
    assert read("out.json")["params_trained"] == sum(
        p.numel() for n, p in model.named_parameters() if n.endswith(names)
    )
    assert f"factormix eval out --against {llama}" in said
    assert not Path("out.work").exists()

    record = read("out/run.json")
    assert read("out/hashes.json")["run.json"] == sha256("out/run.json")
    assert record["schema_version"] == 1 and record["seed"] == 3 and record["tokens"] == 1024
    assert record["config"]["layout"] == "S1A1E4" and record["config"]["model"] == str(llama)
    assert record["data"] == {"words.txt": sha256(text)} and record["metrics"] == result["metrics"]
    assert [phase["name"] for phase in record["phases"]] == ["load", "factorize"]
    assert record["peak_memory_bytes"] > 2**20 and {"torch", "transformers"} <= record["versions"].keys()


def test_the_result_is_what_python_gives(sparse: Path, llama: Path, text: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(llama)
    config = FactorConfig.parse("S1A1E4", tokens=1024, window=32, allocation="uniform")
    model = factorize(dense, config, [str(text)], AutoTokenizer.from_pretrained(llama), quiet=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), factormix.load(sparse).parameters(), strict=True))


def test_a_pruned_models_active_fraction_counts_what_was_dropped(run: Run, llama: Path, text: Path) -> None:
    prune = ("--layout", "S2A0E4", "--partition", "wanda", "--no-layer-fit")
    said = run("factor", llama, "-o", "out", "--text", text, "--json", "out.json", *CUT, *prune)
    assert read("out.json")["metrics"]["active_fraction"] == 0.5 and "(50.0 % of the FFNs)" in said


def test_healing(run: Run, llama: Path, text: Path) -> None:
    Path("words.txt").write_text("w5 " * 200, encoding="utf-8")  # of the same name as the calibration text
    heal = ("--heal-tokens", 128, "--heal-batch-tokens", 32, "--heal-text", "./words.txt")
    run("factor", llama, "-o", "out", "--text", text, "--json", "out.json", *CUT, *heal)
    result = read("out.json")
    assert read("out/run.json")["data"] == {str(path.resolve()): sha256(path) for path in (text, Path("words.txt"))}
    assert result["tokens"] == 1024 + 128 and result["metrics"]["healing"]["tokens"] == 128
    ffns = factormix.load("out").sparse_ffns().values()
    assert result["params_trained"] == sum(p.numel() for ffn in ffns for p in ffn.parameters())


def test_healing_stops_when_its_minutes_are_over(run: Run, llama: Path, text: Path) -> None:
    heal = ("--heal-tokens", 640, "--heal-batch-tokens", 32, "--max-minutes", 1e-6)
    run("factor", llama, "-o", "out", "--text", text, "--json", "out.json", *CUT, *heal)
    assert read("out.json")["metrics"]["healing"]["tokens"] == 32  # one step


def test_generate(run: Run, sparse: Path) -> None:
    said = run("generate", sparse, "w1 w2 w3", "--max-new-tokens", 5, "--json", "g.json")
    assert read("g.json") == {"schema_version": 1, "prompt": "w1 w2 w3", "answer": said.rstrip("\n")}
    assert 1 <= len(said.split()) <= 5


def test_eval(run: Run, sparse: Path, llama: Path, text: Path) -> None:
    short = text.parent / "short.txt"
    short.write_text(text.read_text(encoding="utf-8")[:1500], encoding="utf-8")
    texts = ("--text", text, "--text", short, "--tokens", 2048, "--window", 32)
    said = run("eval", sparse, "--against", llama, *texts, "--in-domain", "words", "--json", "e.json")
    result = read("e.json")
    assert result["perplexity"]["words"].keys() == {"base", "model", "ratio", "ratio_stderr", "tokens"}
    assert result["agreement"]["words"].keys() == {"top1", "kl"}
    assert result["in_domain"] == ["words"] and result["foreign"] == ["short"]
    assert result["mean_ratio"]["all"] and f"{result['perplexity']['words']['model']:.3f}" in said
    assert 1000 < result["perplexity"]["words"]["tokens"] <= 2048 > result["perplexity"]["short"]["tokens"] > 100
    assert read("e.json")["perplexity"]["words"]["base"] > 1
    alone = run("eval", sparse, *texts, "--json", "a.json")
    assert read("a.json")["perplexity"]["words"]["ratio"] is None and "geometric" not in alone
    same = result["perplexity"]["words"]["model"]
    assert read("a.json")["perplexity"]["words"]["model"] == pytest.approx(same, rel=1e-6)


def test_eval_knows_what_calibrated_the_model_and_asks_last_words(
    run: Run, sparse: Path, llama: Path, text: Path
) -> None:
    heldout = text.parent / "words-heldout.txt"
    heldout.write_text(text.read_text(encoding="utf-8"), encoding="utf-8")
    prose = text.parent / "prose.txt"
    prose.write_text("\n\n".join(" ".join(f"w{(i * n) % 50}" for i in range(70)) + " end." for n in range(9)))
    flags = ("--tokens", 512, "--window", 32, "--last-word", prose, "--json", "e.json")
    said = run("eval", sparse, "--against", llama, "--text", heldout, "--text", prose, *flags)
    result = read("e.json")
    assert result["in_domain"] == ["words-heldout"] and result["foreign"] == ["prose"]
    assert result["tasks"]["last-word prose"]["n"] == 9 and result["tasks"]["last-word prose"]["kind"] == "last-word"
    assert "not informative" in said and "(in-domain)" in said


def test_eval_asks_for_facts(run: Run, sparse: Path, llama: Path) -> None:
    Path("known.jsonl").write_text('{"prompt": "w1 w2", "targets": ["w3"]}\n', encoding="utf-8")
    said = run("eval", sparse, "--against", llama, "--facts", "known.jsonl", "--json", "e.json")
    result = read("e.json")
    assert result["recall"]["known"].keys() == {"base", "model"} and not result["perplexity"]
    assert result["recall"]["known"]["model"].keys() == {"facts", "exact", "first_token", "loss"}
    assert result["recall"]["known"]["model"]["loss"] != result["recall"]["known"]["base"]["loss"]
    assert "known" in said and "perplexity" not in said


def test_bench(run: Run, sparse: Path, llama: Path, text: Path) -> None:
    quick = ("--repeats", 1, "--new-tokens", 2, "--prefill", 32, "--text", text)
    run("bench", sparse, "--against", llama, *quick, "--json", "b.json")
    result = read("b.json")
    assert result["decode"].keys() == {"1"} and result["prefill"].keys() == {"32"}
    assert all(result["decode"]["1"][key] > 0 for key in ("base", "model", "ratio"))
    assert [(r["phase"], r["implementation"]) for r in result["runs"]] == [
        (phase, name) for phase in ("decode", "prefill") for name in ("dense", "factormix")
    ]
    assert result["settings"]["dtype"] == "float32" and result["settings"]["threads"] == 1
    memory = {r["implementation"]: r["peak_bytes"] for r in result["runs"]}
    run("bench", sparse, "--against", llama, *quick, "--quantize", "int8", "--json", "q.json")
    result = read("q.json")
    assert result["settings"]["quantize"] == "int8" and result["prefill"]["32"]["ratio"] > 0
    assert all(r["peak_bytes"] < memory[r["implementation"]] for r in result["runs"] if r["phase"] == "prefill")


def test_int8_weights_in_eval_and_generate(run: Run, sparse: Path, llama: Path, text: Path) -> None:
    """The dense model of --against stays as it is."""
    short = ("--text", text, "--window", 32, "--tokens", 64)
    run("eval", llama, "--against", llama, *short, "--quantize", "int8", "--json", "e.json")
    scores = next(iter(read("e.json")["perplexity"].values()))
    assert scores["model"] != scores["base"] and abs(scores["ratio"] - 1) < 0.1
    assert run("generate", sparse, "a b", "--max-new-tokens", 4, "--quantize", "int8", "--json", "g.json")


def test_bench_of_a_shape_writes_a_folder(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    monkeypatch.setitem(SHAPES, "tinyllama", small | {"num_attention_heads": 2, "num_key_value_heads": 2})
    said = run(
        "bench", "--shape", "tinyllama", "--layout", "S1A1E4", "--beside", "active-width", "--generate", 1,
        "--no-prefill", "--repeats", 1, "--new-tokens", 2, "-o", "speed",
    )  # fmt: skip
    assert "active-width" in said and "prefill" not in said
    runs = read("speed/bench.json")["runs"]
    assert [(r["phase"], r["implementation"]) for r in runs] == [
        (phase, name) for phase in ("decode", "generate") for name in ("dense", "factormix", "active-width")
    ]
    assert read("speed/bench.json")["settings"]["model"] == "tinyllama S1A1E4"
    assert "FactorMix ÷ active-width" in Path("speed/bench.md").read_text()


def test_inspect(run: Run, sparse: Path, llama: Path) -> None:
    said = run("inspect", llama, "--active", 0.3, "--json", "i.json")
    result = read("i.json")
    assert result["schema_version"] == 1 and result["sparse"] == []
    assert [limit["active_fraction"] for limit in result["speed_limits"]] == [0.3]
    assert result["groups"][0]["inner"] == 64 and "LlamaForCausalLM" in said
    run("inspect", sparse, "--json", "s.json")
    made = read("s.json")
    assert made["groups"] == result["groups"]  # of the dense model it was made from
    assert [(row["site"], row["slices"], row["width"]) for row in made["sparse"]] == [(0, 4, 16), (1, 4, 16)]
    assert all(0 < row["recall"] <= 1 for row in made["sparse"])


def test_bert(run: Run, text: Path, tmp_path: Path) -> None:
    """An encoder with a masked head: factored, loaded, timed without decoding, no next-token perplexity."""
    bert = save_tiny("bert", tmp_path / "bert")
    run("factor", bert, "-o", "out", "--text", text, *CUT)
    assert type(factormix.load("out")).__name__ == "FactorMixBertForMaskedLM"
    run("bench", "out", "--against", bert, "--prefill", 16, "--repeats", 1, "--json", "b.json")
    assert read("b.json")["decode"] == {} and read("b.json")["prefill"]["16"]["ratio"] > 0


def test_dry_run(run: Run, llama: Path, text: Path, tmp_path: Path) -> None:
    said = run("factor", llama, "-o", "out", "--text", text, "--dry-run", *CUT)
    assert "I = 64 = 4 slices of 16" in said and "1,024 tokens" in said and "GiB" in said
    assert list(tmp_path.iterdir()) == []


def test_overwrite(run: Run, llama: Path, text: Path) -> None:
    run("factor", llama, "-o", "out", "--text", text, *CUT)
    run("factor", llama, "-o", "out", "--text", text, "--overwrite", *CUT, "--gate", "soft")
    assert factormix.load("out").sparse_ffns()[0].spec.output_weight == "soft"


def test_a_recipe_is_the_flags(run: Run, llama: Path, text: Path) -> None:
    """The same run from flags, from a recipe, and from what `validate` prints of it."""
    values = {"model": str(llama), "text": [str(text)], "layout": "S1A1E4", "tokens": 512, "window": 32}
    Path("r.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    run("factor", llama, "-o", "flags", "--text", text, *CUT)
    run("factor", "--recipe", "r.yaml", "-o", "recipe", "--tokens", 1024)  # a flag wins
    said = run("validate", "r.yaml", "--json", "v.json")
    assert "I = 64 = 4 slices of 16" in said
    Path("v.yaml").write_text(said, encoding="utf-8")
    run("factor", "--recipe", "v.yaml", "-o", "resolved", "--tokens", 1024)
    digests = {sha256(f"{out}/model.factormix.safetensors") for out in ("flags", "recipe", "resolved")}
    assert len(digests) == 1
    assert read("v.json")["recipe"] == yaml.safe_load(said)


def test_presets_and_recipes_merge() -> None:
    paper = Recipe.build({"preset": "paper", "layout": "S4A4E16", "heal": {"tokens": 5}, "tokens": 64}).config
    assert (paper.layout, paper.gate, paper.heal.ce, paper.heal.kl) == ("S0A8E16", "paper", 1.0, 0.0)
    assert (paper.heal.tokens, paper.tokens) == (5, 64)
    recipe = Recipe.build({"preset": "paper", "model": "m", "out": "o"})
    assert Recipe.build(recipe.flat()).config == recipe.config


def test_every_option_of_the_config_is_a_flag(run: Run) -> None:
    said = run("factor", "--help")
    for flag in (
        "--layout",
        "--layer-fit / --no-layer-fit",
        "--router-loss",
        "--fit-passes",
        "--heal-lr",
        "--max-minutes",
    ):
        assert flag in said, flag
    assert "coactivation|kmeans" in said


def test_a_flag_of_no_or_zero_counts(run: Run, llama: Path, text: Path) -> None:
    run("factor", llama, "-o", "out", "--text", text, *CUT, "--no-layer-fit", "--heal-kl", 0, "--seed", 0)
    config = read("out/run.json")["config"]
    assert config["layer_fit"] is False and config["heal"]["kl"] == 0


def test_a_note_on_layouts_that_other_engines_refuse(llama: Path, text: Path, run: Run) -> None:
    from factormix.factor.advice import export_advice
    from factormix.nn import Layout

    advice = export_advice(Layout.parse("S4A4E16"), [1536])
    assert (
        advice is not None
        and "12 routed" in advice
        and "S8A4E24" in advice
        and "16 routed experts of width 64" in advice
    )
    assert export_advice(Layout.parse("S8A4E24"), [1536]) is None
    width = export_advice(Layout.parse("S0A4E64"), [1536])
    assert width is not None and "width of 24" in width and "power" not in width


def test_quiet_says_nothing_on_stderr(llama: Path, text: Path) -> None:
    from typer.testing import CliRunner

    from factormix.cli import app

    words = ["factor", str(llama), "-o", "out", "--text", str(text), "--allocation", "uniform", *CUT]
    loud = CliRunner().invoke(app, [*words, "--dry-run"])
    assert "note: layout S1A1E4" in loud.stderr
    assert CliRunner().invoke(app, [*words, "--quiet"]).stderr == ""


def test_factor_for_a_task(run: Run, llama: Path, text: Path) -> None:
    lines = [{"text": " ".join(f"w{(i * k) % 60}" for k in range(40)), "label": f"w{i % 3}"} for i in range(40)]
    Path("task.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    run("factor", llama, "-o", "out", "--task", "task.jsonl", *CUT)
    made = read("out/run.json")
    assert list(made["data"]) == ["task.jsonl"] and made["config"]["task"] == "task.jsonl"
    run("factor", llama, "-o", "both", "--task", "task.jsonl", "--text", text, *CUT)
    assert sorted(read("both/run.json")["data"]) == ["task.jsonl", "words.txt"]
    assert Path("out/model.factormix.safetensors").read_bytes() != Path("both/model.factormix.safetensors").read_bytes()


def test_keep_experts_for_a_task(run: Run, sparse: Path, llama: Path, text: Path) -> None:
    keep = ("factor", sparse, "--keep-experts-for", text, *CUT[2:], "--layout", "S3A0E4", "-o", "out")
    said = run(*keep, "--dry-run")
    assert "S1A1E4 -> S3A0E4" in said and "the 2 of 3 experts" in said and not Path("out").exists()
    run(*keep, "--against", llama)
    made = read("out/run.json")
    assert (
        made["config"]["against"] == str(llama)
        and made["config"]["keep_experts_for"] == str(text)
        and list(made["data"]) == ["words.txt"]
    )
    assert made["metrics"]["active_fraction"] == 0.75
    assert [len(site["kept"]) for site in read("out/config.json")["factormix"]["made_by"]["sites"]] == [2, 2]
    run("eval", "out", "--against", sparse, "--text", text, "--window", 32, "--tokens", 512, "--json", "e.json")
    assert read("e.json")["in_domain"] == ["words"]
    Path("r.yaml").write_text(f"model: {sparse}\nkeep_experts_for: {text}\nlayout: S3A0E4\n", encoding="utf-8")
    assert "the 2 of 3 experts" in run("validate", "r.yaml")
