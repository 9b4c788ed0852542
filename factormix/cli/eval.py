"""`factormix eval`: quality of a model beside its dense base: texts, last words, multiple choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factormix.assets.fetch import source_of
from factormix.cli import options
from factormix.cli.models import Source, locate, locate_text, open_adapted, open_model, open_tokenizer, run_json
from factormix.data.packing import Packed, mask_token, pack, wants_bos
from factormix.data.text import Documents, read_documents
from factormix.evaluate.asked import Asked, masked_tokens
from factormix.evaluate.choice import LIMIT, check_harness, read_task
from factormix.evaluate.last_word import cut_passages
from factormix.evaluate.recall import recall
from factormix.evaluate.suite import LAST_WORD_TOKENS, SUITES, Evaluation, answer_for, evaluate_for
from factormix.nn import vocabulary_head
from factormix.run.errors import FactorMixError, choose
from factormix.run.progress import say

Tokens = Annotated[int, typer.Option("--tokens", help="tokens of each text, from its start; fewer if it is shorter")]
Facts = Annotated[
    list[str] | None,
    typer.Option("--facts", metavar="FILE", help="prompts with targets: how many does the model recall? repeat"),
]
InDomain = Annotated[
    list[str] | None,
    typer.Option(
        "--in-domain",
        metavar="STEM",
        help="a text of the source that calibrated the model; repeat for more; by default what its run.json says",
    ),
]
Window = Annotated[int, typer.Option("--window", help="tokens a window; the documented perplexity has 512")]
SuiteName = Annotated[
    str | None,
    typer.Option("--suite", metavar="|".join(SUITES), help="core: four texts, last words, tasks; text: without tasks"),
]
LastWord = Annotated[
    list[str] | None,
    typer.Option("--last-word", metavar="FILE", help="prose whose passages ask for their last word; repeat for more"),
]
LastWordTokens = Annotated[int, typer.Option("--last-word-tokens", help="tokens of all those passages together")]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        metavar="TASK",
        help="multiple choice by lm-eval: a task of ours, a .jsonl file with choices, or (with a hub) lm-eval's own; "
        "repeat, or separate by commas",
    ),
]
Limit = Annotated[int, typer.Option("--limit", help="questions of a task, at most")]


def evaluate(
    model: options.Model,
    against: options.Against = None,
    adapter: options.Adapter = None,
    gate: options.Gate = None,
    mix: options.Mix = None,
    suite: SuiteName = None,
    text: options.Text = None,
    last_word: LastWord = None,
    tasks: Tasks = None,
    facts: Facts = None,
    tokens: Tokens = 16_384,
    last_word_tokens: LastWordTokens = LAST_WORD_TOKENS,
    limit: Limit = LIMIT,
    in_domain: InDomain = None,
    window: Window = 512,
    seed: options.Seed = 0,
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    device_map: options.DeviceMap = None,
    quantize: options.Quantize = None,
    quiet: options.Quiet = False,
    json: options.Json = None,
) -> None:
    """Perplexity of MODEL on texts and, with --against, its ratio to the dense model and how often both agree.

    Of a masked language model, the perplexity of 15 % of the tokens, hidden behind its mask; a bare encoder is read
    through the masked-LM head that `factormix inject` trained beside the --adapter.
    --suite core adds last-word accuracy and multiple choice, and what MODEL retains of the dense model's accuracy.
    --text, --last-word and --tasks replace those of the suite. --quantize leaves the dense model of --against as it is.
    """
    options.check_json(json)
    chosen = SUITES[choose("suite", suite, SUITES)] if suite else None
    texts, prose = text or list(chosen.texts if chosen else ()), last_word or list(chosen.prose if chosen else ())
    asked = [name for each in tasks or () for name in each.split(",")] or list(chosen.tasks if chosen else ())
    if not (texts or facts or prose or asked):
        raise FactorMixError("no text to evaluate on: give --text FILE, for example --text asset:brown-heldout.")
    if asked:
        check_harness()
        for name in asked:
            read_task(name, limit, seed, quiet)  # what is wrong with a task's data shows before anything is computed
    documents, stories, known = (_by_stem(locate_text(names, quiet)) for names in (texts, prose, facts or ()))
    source, base_source = locate(model, quiet), None if against is None else locate(against, quiet)
    tokenizer = open_tokenizer(source)
    packed = {stem: pack_text(each, tokenizer, window, tokens, quiet) for stem, each in documents.items()}
    share = last_word_tokens // max(1, len(stories))
    passages = {stem: cut_passages(each.plain(tokenizer), tokenizer, share, seed) for stem, each in stories.items()}
    inside = in_domain or in_domain_of(source, documents, quiet)
    opened = open_adapted(source, adapter or (), gate, mix, dtype, device, device_map, quantize)
    base = None if base_source is None else open_model(base_source, dtype, device, device_map)
    sparse, dense, predicts = _speakers(opened, base, adapter or ())
    asks: dict[str, Packed | Asked] = {**packed}
    if predicts == "masked":
        if passages or asked or known:
            raise FactorMixError(
                f"{source.typed!r} predicts masked tokens; last words, tasks and facts ask for the next one. Give "
                "texts alone: --text, without --suite."
            )
        mask = mask_token(tokenizer, opened)
        asks = {stem: masked_tokens(each, mask, seed) for stem, each in packed.items()}
    answers = answer_for({"model": sparse}, dense, passages, asked, tokenizer, limit=limit, seed=seed, quiet=quiet)
    result = Evaluation({}, (), answers["model"], seed=seed)
    if asks:
        scored = evaluate_for({"model": sparse}, dense, asks, in_domain=inside, seed=seed, quiet=quiet, tasks=answers)
        result = scored["model"]
    models = {"base": dense, "model": sparse}
    for stem, each in known.items():
        result.recall[stem] = {
            name: recall(m, tokenizer, each, quiet=quiet).to_dict() for name, m in models.items() if m is not None
        }
    options.put_json(json, result.to_dict())
    typer.echo(_table(result))


def _speakers(
    model: PreTrainedModel, base: PreTrainedModel | None, adapters: Sequence[str]
) -> tuple[nn.Module, nn.Module | None, str]:
    """MODEL and its base with heads over the vocabulary, and whether these predict "next" or "masked" tokens."""
    if vocabulary_head(model) == "masked":
        return model, base, "masked"
    if adapters and vocabulary_head(model) is None:
        from factormix.mix.masked_head import HEAD, HeadedEncoder, needs_head  # imports PEFT

        folder = next((each for each in adapters if (Path(each) / HEAD).is_file()), None)
        if folder is not None and needs_head(model):
            return HeadedEncoder(model, folder), None if base is None else HeadedEncoder(base, folder), "masked"
    return model, base, "next"


def in_domain_of(source: Source, documents: dict[str, Documents], quiet: bool) -> list[str]:
    """The texts that come from where the model's calibration and healing came from, by the model's run.json."""
    data: dict[str, str] = run_json(source).get("data") or {}
    for stem, each in documents.items():
        if each.sha256 in data.values():
            say(f"note: {stem!r} is the very text that {source.typed!r} was made with; it flatters the model.", quiet)
    sources = {source_of(Path(name).stem) for name in data}
    return [stem for stem in documents if source_of(stem) in sources]


def pack_text(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, window: int, tokens: int, quiet: bool
) -> Packed:
    """`tokens` tokens of a text, or all its whole windows where it is shorter; BOS where the tokenizer has one."""
    packed = pack(documents.plain(tokenizer), tokenizer, window, tokens, bos=wants_bos(tokenizer), at_most=True)
    if packed.tokens < tokens // window * window:
        say(f"{documents.name} is shorter than {tokens:,} tokens; all its {packed.tokens:,} are used.", quiet)
    return packed


def _by_stem(paths: Sequence[Path]) -> dict[str, Documents]:
    doubled = [stem for stem, count in Counter(path.stem for path in paths).items() if count > 1]
    if doubled:
        raise FactorMixError(f"two texts have the stem {doubled[0]!r}, by which results are named; rename one.")
    return {path.stem: read_documents(path) for path in paths}


def _table(result: Evaluation) -> str:
    rows = [("text", "tokens", "dense", "model", "ratio", "same top token", "KL, nats")]
    for stem, of in result.texts.items():
        error = "" if of.ratio_stderr is None else f" ± {of.ratio_stderr:.3f}"
        ratio = "-" if of.ratio is None else f"{of.ratio:.3f}{error}"
        base, kl = ("-" if v is None else f"{v:.3f}" for v in (of.base, of.kl))
        top1 = "-" if of.top1 is None else f"{100 * of.top1:.1f} %"
        place = " (in-domain)" if stem in result.in_domain else ""
        rows.append((stem + place, f"{of.tokens:,}", base, f"{of.model:.3f}", ratio, top1, kl))
    what = "perplexity" if result.predicts == "next" else "perplexity of masked tokens"
    lines = [what, *options.aligned(rows)] if result.texts else []
    groups = {"all": None, "in-domain": result.in_domain, "foreign": result.foreign if result.in_domain else ()}
    for name, stems in groups.items():
        mean = result.mean_ratio(stems)
        if mean is not None:
            lines.append(f"geometric mean of the ratios, {name}: {mean:.3f}")
    return "\n".join([*lines, *_recall_table(result), *_answers(result)])


def _answers(result: Evaluation) -> list[str]:
    """The table of tasks, and what is retained."""
    if not result.tasks:
        return []
    rows = [("task", "questions", "chance", "dense", "model", "counts")]
    for name, task in result.tasks.items():
        of = task.to_dict()
        base = "-" if of["base"] is None else f"{of['base']:.3f} ± {of['base_stderr']:.3f}"
        counts = {True: "yes", False: "not informative", None: "-"}[of["informative"]]
        model = f"{of['model']:.3f} ± {of['stderr']:.3f}"
        rows.append((name, str(of["n"]), f"{of['chance']:.3f}", base, model, counts))
    lines = ["", "accuracy", *options.aligned(rows)]
    for key, of in result.retention().items():
        if of is not None:
            low, high = of["interval"]
            least, most = of["above_chance_interval"]
            lines.append(
                f"retention, {key.replace('_', ' ')}: {of['retention']:.3f} ({low:.3f} to {high:.3f}), above chance "
                f"{of['above_chance']:.3f} ({least:.3f} to {most:.3f}); {len(of['tasks'])} tasks count"
            )
    return lines


def _recall_table(result: Evaluation) -> list[str]:
    rows: list[tuple[str, ...]] = [("facts", "asked", "of", "exact", "first token", "loss, nats")]
    for stem, by_model in result.recall.items():
        for name, of in by_model.items():
            shares = [f"{100 * of[key]:.1f} %" for key in ("exact", "first_token")]
            rows.append((stem, f"{of['facts']:,}", name, *shares, f"{of['loss']:.3f}"))
    return options.aligned(rows) if result.recall else []
