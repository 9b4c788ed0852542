"""`factormix demo`: the main job on a real model, with the proof on screen and in a report folder.

fetch -> factor (layer-wise fit) -> the paper's preset beside it -> evaluate both against dense -> bench -> two answers
-> report. With --full, the sparse model is healed by distillation before it is judged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from factormix import checkpoint
from factormix.assets.fetch import fetch
from factormix.data.packing import Packed, pack
from factormix.data.text import read_documents
from factormix.evaluate.answers import answer
from factormix.evaluate.report import write_report
from factormix.evaluate.speed import bench
from factormix.evaluate.suite import Evaluation, evaluate_for
from factormix.factor.config import FactorConfig
from factormix.factor.factorize import factorize, work_directory
from factormix.run.directory import check_output, output_directory, sha256
from factormix.run.progress import say
from factormix.run.record import RunRecord
from factormix.train import bf16_pays

CALIBRATION = "brown-train"
TEXTS = ("brown-heldout", "handbook-test", "foldoc-test")  # the first is of the calibration's kind, the others foreign
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
)
EVAL_TOKENS, WINDOW = 5_120, 512  # a third of what `factormix eval` takes, for the ten minutes
HEAL_TOKENS = 120_000


def demo(
    full: Annotated[
        bool, typer.Option("--full", help="heal with 120k tokens of distillation (up to 45 minutes)")
    ] = False,
    output: Annotated[Path, typer.Option("-o", "--output", help="report folder")] = Path("reports/demo"),
    layout: Annotated[str, typer.Option(help="how each FFN is cut")] = "S4A4E16",
    tokens: Annotated[int, typer.Option(help="calibration tokens")] = 16_384,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    overwrite: Annotated[bool, typer.Option(help="replace an existing report folder")] = False,
    quiet: Annotated[bool, typer.Option(help="no progress on stderr")] = False,
) -> None:
    """Make SmolLM2-135M sparse, judge it against the dense model and the paper's own form, and write a report."""
    check_output(output, overwrite)
    config = FactorConfig.parse(layout, tokens=tokens, seed=seed)
    if full:
        config = config.replace(heal=config.heal.replace(tokens=HEAL_TOKENS))
    record = RunRecord("factormix demo" + (" --full" if full else ""), config.to_dict(), seed=seed)
    with record.phase("fetch model and text"):
        folder = fetch("smollm2", quiet=quiet)
        files = {name: fetch(name, quiet=quiet) for name in (CALIBRATION, *TEXTS)}
        record.data = {name: sha256(path) for name, path in files.items()}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    work = work_directory(output, config, record.data)
    calibration = [str(files[CALIBRATION])]
    with record.phase("factor and heal" if full else "factor"):
        sparse = factorize(dense, config, calibration, tokenizer, work=work, quiet=quiet)
    with record.phase("paper preset"):
        preset = FactorConfig.preset("paper", layout, tokens=tokens, seed=seed)
        paper = factorize(dense, preset, calibration, tokenizer, quiet=quiet)
    with record.phase("evaluate"):
        scores = _judge({"FactorMix": sparse, "paper preset": paper}, dense, files, tokenizer, quiet)
    del paper
    with record.phase("answer two prompts"):
        answers = [
            {"prompt": p, "base": answer(dense, tokenizer, p, 48), "model": answer(sparse, tokenizer, p, 48)}
            for p in PROMPTS
        ]
    with record.phase("bench"):
        speed = bench(sparse, dense, text=_text(files[TEXTS[0]], tokenizer).input_ids.flatten(), quiet=quiet).to_dict()
    record.tokens = tokens + config.heal.tokens
    record.metrics = {name: score.to_dict() for name, score in scores.items()}
    sites = sparse.config.factormix["made_by"]["sites"]
    with output_directory(output, overwrite) as out:
        checkpoint.save(sparse, out / "model", tokenizer)
        record.write(out / "run.json")
        write_report(out, record.to_dict(), record.metrics, speed, sites, answers)
    work.remove()
    _print(scores, speed, answers, record, output)


def _text(path: Path, tokenizer: PreTrainedTokenizerBase) -> Packed:
    return pack(read_documents([str(path)]).texts, tokenizer, WINDOW, tokens=EVAL_TOKENS, bos=True)


def _judge(
    models: dict[str, PreTrainedModel],
    dense: PreTrainedModel,
    files: dict[str, Path],
    tokenizer: PreTrainedTokenizerBase,
    quiet: bool,
) -> dict[str, Evaluation]:
    """Perplexities and agreement; in bfloat16 where the processor computes it natively, half the time of float32."""
    texts = {name: _text(files[name], tokenizer) for name in TEXTS}
    with torch.autocast(dense.device.type, torch.bfloat16, enabled=bf16_pays(dense.device)):
        return evaluate_for(models, dense, texts, in_domain=TEXTS[:1], quiet=quiet)


def _print(
    scores: dict[str, Evaluation], speed: dict[str, Any], answers: list[dict[str, str]], record: RunRecord, output: Path
) -> None:
    """The proof on screen."""
    print(f"\n{'perplexity':<16}{'dense':>9}" + "".join(f"{name:>24}" for name in scores))
    for text in TEXTS:
        found = [score.texts[text] for score in scores.values()]
        print(f"{text:<16}{found[0].base:>9.1f}" + "".join(f"{s.model:>14.1f} ({s.ratio:>6.2f}x)" for s in found))
    print(f"{'geometric mean':<25}" + "".join(f"{score.mean_ratio():>22.2f}x " for score in scores.values()))
    for kind in ("decode", "prefill"):
        for size, at in speed[kind].items():
            print(f"{kind} {size}: dense {at['base']:.1f}, sparse {at['model']:.1f} tokens/s ({at['ratio']:.2f}x)")
    for row in answers:
        print(f"\n> {row['prompt']}\ndense:  {row['base']}\nsparse: {row['model']}")
    print()
    for phase in record.phases:
        say(f"{phase['name']:<24}{phase['seconds']:>7.0f} s")
    print(f"peak memory {record.peak_memory_bytes / 2**30:.1f} GiB; report: {output}/report.md")
