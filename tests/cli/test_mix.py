"""inject, merge and --adapter from the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM

from factormix.run.directory import sha256
from tests.cli.tiny import save_tiny

MAIN = "from factormix.cli import main; main()"
QUICK = "--tokens 1024 --window 32 --batch-tokens 64 --width 8 --lr 0.01 --save-steps 2".split()
PATIENCE = 60.0  # seconds
Run = Callable[..., str]


def words(model: Path, text: Path, out: str, *more: str) -> list[str]:
    fixed = ["inject", str(model), "--domain", "pubmed", "--knowledge", str(text), "--retain", str(text), "-o", out]
    return [*fixed, *QUICK, *more]


@pytest.fixture
def adapter(llama: Path, text: Path, run: Run) -> Path:
    run(*words(llama, text, "adapter", "--quiet"))
    return Path("adapter")


def test_inject_writes_pefts_directory_and_a_record(llama: Path, text: Path, run: Run) -> None:
    said = run(*words(llama, text, "adapter", "--json", "result.json"))
    assert "768 parameters" in said and "was not taught: factormix eval" in said and "--text FILE" in said
    names = {path.name for path in Path("adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "gate", "run.json"}
    assert not Path("adapter.work").exists()
    result, record = (json.loads(Path(p).read_text()) for p in ("result.json", "adapter/run.json"))
    assert result["schema_version"] == 1 and result["tokens"] == record["tokens"] == 1024
    assert result["params_trained"] == result["metrics"]["adapter"]["parameters"] == 768
    assert len(result["metrics"]["history"]) == 16 and result["metrics"]["history"][0]["old"] == 0
    assert record["data"] == {text.name: sha256(text)} and record["config"]["domain"] == "pubmed"
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert config["peft_type"] == "MIXDA" and config["base_model_name_or_path"] == str(llama)
    base = AutoModelForCausalLM.from_pretrained(llama)
    assert set(PeftModel.from_pretrained(base, "adapter", adapter_name="pubmed").peft_config) == {"pubmed"}


def test_an_adapters_own_gate_serves_every_command(llama: Path, text: Path, adapter: Path, run: Run) -> None:
    common = ["--against", llama, "--text", text, "--window", "32", "--quiet"]
    for name, more in (("open", []), ("own", ["--gate", "own"])):
        run("eval", llama, "--adapter", adapter, *more, *common, "--json", f"{name}.json")
    run("merge", llama, "--adapter", adapter, "--gate", "own", "--to", "qwen2_moe", "-o", "moe", "--quiet")
    run("eval", "moe", *common, "--json", "moe.json")
    found = {
        name: json.loads(Path(f"{name}.json").read_text())["perplexity"]["words"] for name in ("open", "own", "moe")
    }
    assert found["own"]["model"] not in (found["open"]["model"], found["own"]["base"])
    assert abs(found["own"]["model"] / found["moe"]["model"] - 1) < 1e-5
    run(*words(llama, text, "bare", "--quiet", "--gate-tokens", "0"))
    assert not Path("bare/gate").exists()


def test_eval_generate_and_merge_agree(llama: Path, text: Path, adapter: Path, run: Run) -> None:
    common = ["--against", llama, "--text", text, "--window", "32", "--quiet"]
    run("eval", llama, "--adapter", adapter, *common, "--json", "a.json")
    run("merge", llama, "--adapter", adapter, "-o", "merged", "--json", "m.json", "--quiet")
    run("eval", "merged", *common, "--json", "b.json")
    apart, merged = (json.loads(Path(p).read_text())["perplexity"]["words"] for p in ("a.json", "b.json"))
    assert apart["model"] != apart["base"] and abs(apart["model"] / merged["model"] - 1) < 1e-5
    assert json.loads(Path("m.json").read_text())["inner"] == 96
    ask = ["w3 w4", "--max-new-tokens", "8"]
    assert run("generate", llama, *ask, "--adapter", adapter) == run("generate", "merged", *ask)
    assert AutoModelForCausalLM.from_pretrained("merged").config.intermediate_size == 96
    run("merge", llama, "--adapter", adapter, "--weight", "0", "-o", "nothing", "--quiet")
    assert run("generate", "nothing", *ask) == run("generate", llama, *ask)


def test_a_folders_name_may_hold_a_dot(llama: Path, text: Path, adapter: Path, run: Run) -> None:
    shutil.copytree(adapter, "pubmed-v1.2")
    ask = ["w3 w4", "--max-new-tokens", "8", "--quiet", "--gate", "own", "--adapter"]
    assert run("generate", llama, *ask, "pubmed-v1.2") == run("generate", llama, *ask, adapter)
    words = "--tokens 200 --window 32 --quiet".split()
    run("adapt", llama, "--domains", "pubmed-v1.2", "--task", text, "--dev", text, "-o", "mixed", *words)
    assert run("generate", llama, "w3 w4", "--quiet", "--mix", "mixed")


def test_a_gated_domain_becomes_a_qwen2_moe(llama: Path, text: Path, adapter: Path, run: Run, refused: Run) -> None:
    words = "--tokens 2000 --window 32 --lr 0.05 --quiet".split()
    run("adapt", llama, "--domains", adapter, "--task", text, "--dev", text, "-o", "mixed", *words)
    merge = ["merge", llama, "--adapter", adapter, "--gate", "mixed/gate", "-o", "moe"]
    assert "does not merge exactly" in refused(*merge)
    assert "needs --gate" in refused("merge", llama, "--adapter", adapter, "--to", "qwen2_moe", "-o", "moe")
    assert "Did you mean 'qwen2_moe'" in refused(*merge, "--to", "qwen2-moe")
    assert "the gate decides the weight" in refused(*merge, "--to", "qwen2_moe", "--weight", "0.5")
    run(*merge, "--to", "qwen2_moe", "--quiet")
    ask = ["w3 w4", "--max-new-tokens", "8", "--quiet"]
    assert run("generate", "moe", *ask) == run("generate", llama, *ask, "--mix", "mixed")
    assert AutoModelForCausalLM.from_pretrained("moe").config.model_type == "qwen2_moe"


def test_a_factored_model_takes_adapter_and_merge(sparse: Path, text: Path, run: Run) -> None:
    run(*words(sparse, text, "adapter", "--quiet"))
    run("merge", sparse, "--adapter", "adapter", "-o", "merged", "--quiet")
    common = ["--text", text, "--window", "32", "--quiet"]
    run("eval", sparse, "--adapter", "adapter", *common, "--json", "a.json")
    run("eval", "merged", *common, "--json", "b.json")
    apart, merged = (json.loads(Path(p).read_text())["perplexity"]["words"]["model"] for p in ("a.json", "b.json"))
    assert abs(apart / merged - 1) < 1e-5


def test_a_masked_language_model_and_facts(tmp_path: Path, text: Path, run: Run, refused: Run) -> None:
    model = save_tiny("bert", tmp_path / "bert")
    facts = Path("facts.jsonl")
    facts.write_text("\n".join(json.dumps({"prompt": f"w{i} {{}} .", "targets": [f"w{i + 1}"]}) for i in range(40)))
    said = run(*words(model, text, "adapter", "--knowledge", str(facts), "--form", "bottleneck"))
    assert "width 8" in said and "next: factormix adapt" in said
    ask = ["eval", model, "--against", model, "--text", text, "--window", "32"]
    assert "perplexity of masked tokens" in run(*ask, "--adapter", "adapter", "--json", "a.json")
    run(*ask, "--json", "b.json")
    assert "predicts masked tokens; last words, tasks and facts ask for the next" in refused(*ask, "--facts", facts)
    found, alone = (json.loads(Path(name).read_text()) for name in ("a.json", "b.json"))
    assert found["predicts"] == "masked" and alone["perplexity"]["words"]["ratio"] == 1
    assert found["perplexity"]["words"]["ratio"] != 1
    assert found["perplexity"]["words"]["base"] == alone["perplexity"]["words"]["base"]


def test_an_encoder_without_a_head_is_given_one_first(tmp_path: Path, text: Path, run: Run, refused: Run) -> None:
    model = save_tiny("bert-base", tmp_path / "bert")
    said = run(*words(model, text, "adapter", "--head-tokens", "512", "--dry-run"))
    assert "first a masked-LM head on 512 general tokens" in said
    run(*words(model, text, "adapter", "--head-tokens", "512", "--json", "result.json"))
    names = {path.name for path in Path("adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "gate", "masked_head.safetensors", "run.json"}
    metrics = json.loads(Path("result.json").read_text())["metrics"]
    assert metrics["head"]["tokens"] == 512 and len(metrics["head"]["history"]) == 8
    PeftModel.from_pretrained(AutoModel.from_pretrained(model), "adapter", adapter_name="pubmed")
    ask = ["eval", model, "--against", model, "--text", text, "--window", "32"]
    assert "perplexity of masked tokens" in run(*ask, "--adapter", "adapter", "--json", "a.json")
    scores = json.loads(Path("a.json").read_text())["perplexity"]["words"]
    assert scores["model"] != scores["base"]
    assert "does not predict the next token" in refused(*ask)


def test_a_recipe_is_the_same_as_flags(llama: Path, text: Path, adapter: Path, run: Run) -> None:
    lines = [f"model: {llama}", "domain: pubmed", f"knowledge: [{text}]", f"retain: [{text}]", "out: other"]
    options = ["tokens: 1024", "window: 32", "batch_tokens: 64", "width: 8", "lr: 0.01", "save_steps: 2"]
    Path("r.yaml").write_text("\n".join([*lines, *options]))
    run("inject", "--recipe", "r.yaml", "--quiet")
    assert sha256("other/adapter_model.safetensors") == sha256(adapter / "adapter_model.safetensors")


def test_retention_text_by_retrieval(llama: Path, text: Path, tmp_path: Path, run: Run) -> None:
    encoder = save_tiny("bert-base", tmp_path / "encoder")
    more = ["--retain-by", "nearest", "--retriever", str(encoder)]
    assert "the nearest by" in run(*words(llama, text, "near", *more, "--dry-run"))
    run(*words(llama, text, "near", *more, "--json", "near.json"))
    run(*words(llama, text, "chance", "--quiet"))
    passages = json.loads(Path("near.json").read_text())["metrics"]["passages"]
    assert 1 <= passages["used"] <= 8 and passages["of"] == 4 * 1024 // 4 // 32  # L_S at one micro-batch in four
    assert sha256("near/adapter_model.safetensors") != sha256("chance/adapter_model.safetensors")


def test_validate_reads_recipes_of_inject_and_adapt(llama: Path, adapter: Path, tmp_path: Path, run: Run) -> None:
    Path("r.yaml").write_text(f"model: {llama}\ndomain: pubmed\nknowledge: [a.txt]\nretain: [b.txt]\nwidth: 8\n")
    said = run("validate", "r.yaml", "--json", "v.json")
    assert "# for factormix inject" in said and "# 1 adapters of width 8 at layers 0: 768 parameters" in said
    values = json.loads(Path("v.json").read_text())
    assert values["command"] == "inject" and values["recipe"]["lr"] is None and values["recipe"]["domain"] == "pubmed"
    Path("again.yaml").write_text(said)
    assert run("validate", "again.yaml") == said
    Path("a.yaml").write_text(f"model: {llama}\ndomains: [{adapter}]\ntask: t.jsonl\nshots: 4\n")
    said = run("validate", "a.yaml", "--json", "v.json")
    assert "# for factormix adapt" in said and "# adapter: ffn of width 8 at sites 0" in said
    assert json.loads(Path("v.json").read_text())["recipe"]["epochs"] == 20


def test_validate_knows_a_recipe_of_factor_by_its_own_keys(llama: Path, run: Run) -> None:
    Path("f.yaml").write_text(f"model: {llama}\ntask: t.jsonl\nlayout: S1A1E4\n")  # `task` is a key of adapt too
    said = run("validate", "f.yaml", "--json", "v.json")
    assert "# for factormix factor" in said and json.loads(Path("v.json").read_text())["command"] == "factor"
    Path("again.yaml").write_text(said)
    assert run("validate", "again.yaml") == said


def test_validate_refuses_what_cannot_be(llama: Path, adapter: Path, tmp_path: Path, refused: Run) -> None:
    bert = save_tiny("bert", tmp_path / "bert")
    for lines, message in (
        ("domain: x\nlayer: auto\n", "no key 'layer'"),
        (f"domain: x\nmodel: {llama}\nlayers: '7'\n", "[7] not allowed"),
        (f"task: t.jsonl\nmodel: {bert}\ndomains: [{adapter}]\n", "was made for another model: its site 0"),
        (f"task: t.jsonl\nmodel: {llama}\ndomains: [nowhere]\n", "has no adapter_config.json"),
        ("task: t.jsonl\nshots: 0\n", "shots received 0"),
    ):
        Path("r.yaml").write_text(lines)
        assert message in refused("validate", "r.yaml")


def test_dry_run_prints_the_numbers_and_writes_nothing(llama: Path, sparse: Path, text: Path, run: Run) -> None:
    for model in (llama, sparse):
        said = run(*words(model, text, "adapter", "--dry-run"))
        assert "1 adapters of width 8 at layers 0: 768 parameters" in said and "1,536 FLOPs per token" in said
    said = run(*words(llama, text, "adapter", "--batch-tokens", "100", "--dry-run"))
    assert "960 tokens of knowledge, 96 a step" in said  # whole windows of 32, whole steps of 1,024 tokens
    assert not Path("adapter").exists() and not Path("adapter.work").exists()


def test_killed_and_resumed(llama: Path, text: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}

    def start(out: str, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", MAIN, *words(llama, text, out, "--tokens", "16384", *more)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    process, deadline = start("killed"), time.monotonic() + PATIENCE
    while not Path("killed.work/stage1/checkpoint-4/trainer_state.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not Path("killed").exists()

    other = start("killed", "--lr", "0.02")
    _, refusal = other.communicate(timeout=PATIENCE)
    assert other.returncode == 2 and "lr was 0.01, is 0.02" in refusal

    for out in ("killed", "whole"):
        process = start(out)
        _, stderr = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, stderr
        assert ("resuming after step" in stderr) == (out == "killed") and not Path(f"{out}.work").exists()
    assert sha256("killed/adapter_model.safetensors") == sha256("whole/adapter_model.safetensors")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--layers", "7"], r"[7] not allowed; this model has 0 to 1"),
        (["--form", "lora"], "allowed: 'ffn', 'bottleneck'"),
        (["--domain", "a/b"], "domain 'a/b' is not allowed"),
        (["--reduction", "4"], "give one of them"),
        (["--retain-by", "nearest", "--old-knowledge", "none"], "retain_by 'nearest' chooses the text of L_S"),
        (["--retain-by", "nearest", "--retriever", "./none"], "'./none' does not exist"),
        (["--retain", "no.txt"], "no.txt' does not exist"),
    ],
)
def test_bad_choices_are_refused_before_anything_is_computed(
    more: list[str], message: str, llama: Path, text: Path, refused: Run
) -> None:
    assert message in refused(*words(llama, text, "out", *more))


def test_incomplete_commands_and_wrong_adapters_are_refused(llama: Path, text: Path, refused: Run) -> None:
    assert "inject needs MODEL, --domain" in refused("inject", llama, "--domain", "pubmed", "-o", "out")
    assert "merge needs --adapter" in refused("merge", llama, "-o", "out")
    assert "has no adapter_config.json" in refused("merge", llama, "--adapter", llama, "-o", "out")
    assert "has no adapter_config.json" in refused("generate", llama, "w1", "--adapter", llama)
    assert "have the same name" in refused("generate", llama, "w1", "--adapter", "a/x", "--adapter", "b/x")
    two = ["--adapter", "a", "--weight", "1", "--weight", "2"]
    assert "1 adapters and 2 weights" in refused("merge", llama, *two, "-o", "out")


def test_an_existing_adapter_is_kept(llama: Path, text: Path, adapter: Path, refused: Run) -> None:
    before = sha256(adapter / "adapter_model.safetensors")
    assert "choose another, or replace it with --overwrite" in refused(*words(llama, text, "adapter"))
    assert sha256(adapter / "adapter_model.safetensors") == before


def test_a_truncated_adapter_is_named(llama: Path, adapter: Path, refused: Run) -> None:
    shutil.copytree(adapter, "cut")
    file = Path("cut/adapter_model.safetensors")
    file.write_bytes(file.read_bytes()[:-7])
    for command in (("generate", llama, "w1"), ("merge", llama, "-o", "out")):
        said = refused(*command, "--adapter", "cut")
        assert "adapter_model.safetensors' is truncated or no safetensors file" in said


def test_loading_an_adapter_trains_nothing(llama: Path, adapter: Path) -> None:
    from factormix.cli.models import locate, open_adapted

    model = open_adapted(locate(str(llama)), [str(adapter)])
    assert not any(p.requires_grad for n, p in model.named_parameters() if "mixda" in n)
    assert not model.training and torch.isfinite(model(torch.tensor([[1, 5]])).logits).all()
