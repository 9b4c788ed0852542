"""`factormix predict`: a stage-2 directory and new text in, predictions line by line out."""

from __future__ import annotations

import json as jsonlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from factormix.cli import options
from factormix.cli.models import Source, check_base, locate, locate_text, open_model, open_tokenizer
from factormix.data.labelled import read_labelled, read_lines
from factormix.run.directory import atomic_path, check_output_file
from factormix.run.errors import FactorMixError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from factormix.mix.mix_model import MixModel
    from factormix.mix.task import Task

SCHEMA_VERSION = 1


def predict(
    mix: Annotated[Path, typer.Option("--mix", metavar="DIR", help="a directory that `factormix adapt` wrote")],
    source: Annotated[str, typer.Option("--input", metavar="FILE", help="a .jsonl file, labelled or not")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="the .jsonl file to write")],
    model: Annotated[
        str | None, typer.Option("--model", help="the base, where it is no longer where it was when adapting")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="examples a forward", min=1)] = 8,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="of an answer to a prompt", min=1)] = 16,
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    device_map: options.DeviceMap = None,
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
    json: options.Json = None,
) -> None:
    """Predict every line of --input: its keys and "prediction", with "scores" where there are labels or choices.

    Where the input has labels, the metrics are printed too.
    """
    from factormix.mix.load import load_mix, read_task, task_in  # imports PEFT, which most commands do without

    _check_out(out, overwrite)
    options.check_json(json)
    values = read_task(mix)
    task = task_in(values)
    if task.kind == "text":
        raise FactorMixError(f"{str(mix)!r} holds gates trained on plain text: there is no task to predict.")
    path = locate_text([source], quiet)[0]
    records, numbers, _ = read_lines(path)
    base = _base(mix, values["base"], model, quiet)
    tokenizer = open_tokenizer(base)
    loaded, task = load_mix(mix, open_model(base, dtype, device, device_map))
    metrics: dict[str, float] = {}
    if task.kind == "causal-lm":
        said = _answers(loaded, records, numbers, path, tokenizer, max_new_tokens)
    else:
        said, metrics = _labels(loaded, task, path, tokenizer, batch_size)
    lines = [jsonlib.dumps({**record, **each}, ensure_ascii=False) for record, each in zip(records, said)]
    with atomic_path(out) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    options.put_json(json, {"schema_version": SCHEMA_VERSION, "n": len(lines), "metrics": metrics})
    scores = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    typer.echo(f"{out}: {len(lines):,} predictions" + (f"; {scores}" if scores else ""))


def _check_out(out: Path, overwrite: bool) -> None:
    if out.suffix != ".jsonl":
        raise FactorMixError(f"output {str(out)!r} must be a .jsonl file.")
    check_output_file(out, overwrite)


def _base(mix: Path, base: dict[str, Any], model: str | None, quiet: bool) -> Source:
    """The base that task.json names, or the one given instead; its weights must be those of then."""
    if not base and model is None:
        raise FactorMixError(f"{str(mix)!r} does not say what base it was made from; name it with --model.")
    if model is None:
        model = os.path.normpath(mix.resolve() / base["path"]) if base.get("path") else base["model"]
    source = locate(str(model), quiet)
    check_base(source, mix, base)
    return source


def _labels(
    mix: MixModel, task: Task, path: Path, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Predictions of every line, and metrics where the lines have labels."""
    from factormix.evaluate.classification import task_metrics
    from factormix.mix.predict import predict_examples

    examples = read_labelled(path, task.kind, labels=False)
    if examples.labels is not None:
        task.check_labels(examples)
    said = predict_examples(mix, task, examples, tokenizer, batch_size)
    if examples.labels is None:
        return said, {}
    predicted: list[Any] = [each["prediction"] for each in said]
    if examples.choices is not None:
        predicted = [choices.index(p) for choices, p in zip(examples.choices, predicted)]
    elif task.kind == "multi-label":
        predicted = [tuple(p) for p in predicted]
    return said, task_metrics(task.kind, predicted, examples.labels, task.labels)


def _answers(
    mix: MixModel,
    records: list[dict[str, Any]],
    numbers: list[int],
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    from factormix.mix.predict import predict_prompts

    for record, number in zip(records, numbers):
        if not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
            raise FactorMixError(f"{str(path)!r} line {number} has no 'prompt', a non-empty string.")
    return predict_prompts(mix, [record["prompt"] for record in records], tokenizer, max_new_tokens)
