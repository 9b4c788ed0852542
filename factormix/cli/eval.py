"""`factormix eval`: perplexity and agreement of a model beside its dense base, text by text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedTokenizerBase

from factormix.cli import options
from factormix.cli.models import locate, locate_text, open_adapted, open_model, open_tokenizer
from factormix.data.packing import Packed, pack, wants_bos
from factormix.data.text import Documents, read_documents
from factormix.evaluate.recall import recall
from factormix.evaluate.suite import Evaluation
from factormix.evaluate.suite import evaluate as score
from factormix.run.errors import FactorMixError
from factormix.run.progress import say

Tokens = Annotated[int, typer.Option("--tokens", help="tokens of each text, from its start; fewer if it is shorter")]
Facts = Annotated[
    list[str] | None,
    typer.Option("--facts", metavar="FILE", help="prompts with targets: how many does the model recall? repeat"),
]
InDomain = Annotated[
    list[str] | None,
    typer.Option("--in-domain", metavar="STEM", help="a text of the source that calibrated the model; repeat for more"),
]
Window = Annotated[int, typer.Option("--window", help="tokens a window; the documented perplexity has 512")]


def evaluate(
    model: options.Model,
    against: options.Against = None,
    adapter: options.Adapter = None,
    gate: options.Gate = None,
    mix: options.Mix = None,
    text: options.Text = None,
    facts: Facts = None,
    tokens: Tokens = 16_384,
    in_domain: InDomain = None,
    window: Window = 512,
    seed: options.Seed = 0,
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    device_map: options.DeviceMap = None,
    quiet: options.Quiet = False,
    json: options.Json = None,
) -> None:
    """Perplexity of MODEL on texts and, with --against, its ratio to the dense model and how often both agree."""
    options.check_json(json)
    if not (text or facts):
        raise FactorMixError("no text to evaluate on: give --text FILE, for example --text asset:brown-heldout.")
    documents, asked = _by_stem(locate_text(text or (), quiet)), _by_stem(locate_text(facts or (), quiet))
    source, base_source = locate(model, quiet), None if against is None else locate(against, quiet)
    tokenizer = open_tokenizer(source)
    packed = {stem: pack_text(each, tokenizer, window, tokens, quiet) for stem, each in documents.items()}
    sparse = open_adapted(source, adapter or (), gate, mix, dtype, device, device_map)
    dense = None if base_source is None else open_model(base_source, dtype, device, device_map)
    result = score(sparse, dense, packed, in_domain=in_domain or (), seed=seed, quiet=quiet) if text else Evaluation({})
    models = {"base": dense, "model": sparse}
    for stem, each in asked.items():
        result.recall[stem] = {
            name: recall(m, tokenizer, each, quiet=quiet).to_dict() for name, m in models.items() if m is not None
        }
    options.put_json(json, result.to_dict())
    typer.echo(_table(result))


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
        rows.append((stem, f"{of.tokens:,}", base, f"{of.model:.3f}", ratio, top1, kl))
    lines = ["perplexity", *options.aligned(rows)] if result.texts else []
    groups = {"all": None, "in-domain": result.in_domain, "foreign": result.foreign if result.in_domain else ()}
    for name, stems in groups.items():
        mean = result.mean_ratio(stems)
        if mean is not None:
            lines.append(f"geometric mean of the ratios, {name}: {mean:.3f}")
    return "\n".join([*lines, *_recall_table(result)])


def _recall_table(result: Evaluation) -> list[str]:
    rows: list[tuple[str, ...]] = [("facts", "asked", "of", "exact", "first token", "loss, nats")]
    for stem, by_model in result.recall.items():
        for name, of in by_model.items():
            shares = [f"{100 * of[key]:.1f} %" for key in ("exact", "first_token")]
            rows.append((stem, f"{of['facts']:,}", name, *shares, f"{of['loss']:.3f}"))
    return options.aligned(rows) if result.recall else []
