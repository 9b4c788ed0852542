"""Tokens a second, dense against sparse, in one process and turn by turn.

    result = bench(model, dense)                                        # decode batch 1, prefill 512, float32, 1 thread
    result = bench(model, dense, decode_batches=(1, 8), dtypes=("float32", "bfloat16"), threads=(1, 2))
    result = bench(model, dense, beside=("active-width",))              # and what it could reach
    write_json(path, result.to_dict())                                  # docs/json.md

Decode is the time of greedy steps with a key-value cache, the prompt's own forward left out; prefill is the time of
one forward over a window, without cache and with the logits of the last token only; generate is all that the model's
own ``generate()`` takes, prompt included. The models take turns, who goes first alternates, so that a slow spell of the
machine hits all; one round is warm-up. Whole models run, layer after layer, so that no cache holds a layer's weights
until its next turn (models far smaller than a cache excepted). Speeds are medians over `repeats` rounds, with the
quartiles beside; `limit` is the ratio that bytes (decode) or FLOPs (prefill) allow, see `factormix.evaluate.roofline`.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from factormix.evaluate.causal import REMEDY, accepts
from factormix.evaluate.companions import companion
from factormix.evaluate.cost import weight_bytes
from factormix.evaluate.memory import PeakMemory
from factormix.evaluate.roofline import ExpertsHit, cache_bytes, decode_bytes, prefill_flops
from factormix.run.errors import FactorMixError, choose
from factormix.run.progress import progress
from factormix.run.record import RunRecord

SCHEMA_VERSION = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DENSE, SPARSE = "dense", "factormix"
PAGE_BYTES = 4096
Convert = Callable[[nn.Module, torch.dtype], nn.Module]


@dataclass(frozen=True)
class Run:
    """One implementation in one setting."""

    phase: str
    """decode, generate or prefill"""
    size: int
    """decode, generate: batch size; prefill: tokens of the window"""
    dtype: str
    threads: int
    implementation: str
    """dense, factormix, or one of `companions.COMPANIONS`"""
    tokens_per_s: float
    """median over the rounds"""
    tokens_per_s_iqr: tuple[float, float]
    """first and third quartile over the rounds"""
    ratio: float | None
    """tokens_per_s over that of dense; None without a base"""
    limit: float | None
    """the ratio that the bytes (decode) or FLOPs (prefill) of the two allow; None without a base and for generate"""
    peak_bytes: int
    """the implementation's own weights and the most that its warm-up round held beyond them"""
    cost: float | None = None
    """decode: bytes that a step reads; prefill: floating-point operations of the window; generate: None"""


@dataclass(frozen=True)
class Bench:
    """All runs, and how they were made."""

    runs: tuple[Run, ...]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The JSON of ``factormix bench``, as docs/json.md has it: the first dtype and thread count up front."""
        defaults = (self.settings["dtype"], self.settings["threads"])
        first = [run for run in self.runs if (run.dtype, run.threads) == defaults]
        front: dict[str, dict[str, dict[str, float | None]]] = {"decode": {}, "prefill": {}}
        for run in first:
            if run.phase not in front or run.implementation not in (DENSE, SPARSE):
                continue
            entry = front[run.phase].setdefault(str(run.size), {"base": None, "model": None, "ratio": None})
            entry["base" if run.implementation == DENSE else "model"] = run.tokens_per_s
            if run.implementation == SPARSE:
                entry["ratio"] = run.ratio
        runs = [{**vars(run), "tokens_per_s_iqr": list(run.tokens_per_s_iqr)} for run in self.runs]
        return {"schema_version": SCHEMA_VERSION, **front, "runs": runs, "settings": self.settings}


def bench(
    model: nn.Module,
    base: nn.Module | None,
    *,
    decode_batches: Sequence[int] = (1,),
    prefill_tokens: Sequence[int] = (512,),
    generate_batches: Sequence[int] = (),
    beside: Sequence[str] = (),
    dtypes: Sequence[str] = ("float32",),
    threads: Sequence[int] = (1,),
    prompt_tokens: int = 64,
    new_tokens: int = 32,
    repeats: int = 5,
    text: Tensor | None = None,
    convert: Convert | None = None,
    compiled: bool = False,
    seed: int = 0,
    quiet: bool = True,
) -> Bench:
    """Time `model`, and `base` in turn with it, in every combination of the settings.

    Args:
        model: the sparse model. An encoder can be timed with ``decode_batches=()``.
        base: the dense model it was made from, or None to time `model` alone.
        decode_batches: batch sizes to decode with.
        prefill_tokens: window lengths to prefill (batch 1).
        generate_batches: batch sizes to time ``generate()`` with.
        beside: of `companions.COMPANIONS`, what else takes turns.
        dtypes: of "float32", "bfloat16", "float16"; the first is the default that the result shows up front.
        threads: CPU thread counts; the count in force is put back at the end.
        prompt_tokens: length of the prompt that decoding starts from.
        new_tokens: tokens decoded and timed a round.
        repeats: timed rounds.
        text: (n,) token ids to take prompts and windows from, repeated as needed; None draws them at random. Real
            text shows the experts' real load.
        convert: ``convert(model, dtype)``: the model in another dtype than it has, for example by loading it again;
            None casts a copy of the parameters.
        compiled: decode by torch.compile's step with a static cache, one graph without breaks; prompts, prefill and
            ``generate()`` are not compiled.
        seed: of the random tokens.
        quiet: no progress line.

    Raises:
        FactorMixError: a dtype, size or companion that cannot be, or decoding asked of a model that cannot generate.
    """
    implementations = {SPARSE: model} if base is None else {DENSE: base, SPARSE: model}
    sizes = {"decode": decode_batches, "generate": generate_batches, "prefill": prefill_tokens}
    work = [(phase, size) for phase, of in sizes.items() for size in of]
    _check(implementations, work, dtypes, threads, prompt_tokens, new_tokens, repeats)
    if text is None:
        text = _random_tokens(implementations.values(), seed)
    device = _device(model)
    settings = {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "dtype": dtypes[0],
        "threads": threads[0],
        "compiled": compiled,
        "device": str(device),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else RunRecord("bench").machine,
        "torch": torch.__version__,
    }
    combinations = [(dtype, count, *item) for dtype in dtypes for count in threads for item in work]
    done: list[Run] = []
    current: dict[str, nn.Module] = {}
    held = None
    with _settings_restored(implementations.values()):
        for dtype, count, phase, size in progress(combinations, label="bench", total=len(combinations), quiet=quiet):
            if held != dtype:
                current = {}  # let go of the last dtype's copies before making new ones
                current = {name: _as(each, DTYPES[dtype], convert) for name, each in implementations.items()}
                current |= {name: companion(name, current[SPARSE], current.get(DENSE)) for name in beside}
                held = dtype
                for each in current.values():
                    _make_resident(each)
            torch.set_num_threads(count)
            steps: dict[str, CompiledStep] = {}
            if compiled and phase == "decode":
                torch.compiler.reset()  # what was compiled holds another number of threads, and its models
                steps = {name: CompiledStep(each, prompt_tokens + new_tokens) for name, each in current.items()}
            measured = _rounds(current, steps, phase, size, text, prompt_tokens, new_tokens, repeats)
            done += _runs(measured, phase, size, dtype, count)
    return Bench(tuple(done), settings)


class CompiledStep:
    """A model's decoding step as one graph, and the static cache that all its rounds use in turn."""

    def __init__(self, model: nn.Module, length: int) -> None:
        self.cache = StaticCache(config=model.config, max_cache_len=length)  # type: ignore[arg-type]
        self.forward = torch.compile(model, fullgraph=True, dynamic=False)

    def empty_cache(self) -> StaticCache:
        """The cache as it was before the first round."""
        self.cache.reset()
        return self.cache


@dataclass
class _Measured:
    """Of one implementation in one setting."""

    speeds: list[float]
    """tokens a second of each round"""
    peak: int
    """bytes, of the warm-up round"""
    cost: float | None
    """see `Run`"""


def _rounds(
    models: Mapping[str, nn.Module],
    steps: Mapping[str, CompiledStep],
    phase: str,
    size: int,
    text: Tensor,
    prompt: int,
    new: int,
    repeats: int,
) -> dict[str, _Measured]:
    # for both or for none: the work must be the same
    last_only = phase == "prefill" and all(_keeps_last(model) for model in models.values())

    def once(model: nn.Module, step: CompiledStep | None = None) -> tuple[float, float]:
        """Tokens a second, and bytes in the key-value cache as a step finds it on average."""
        if phase == "prefill":
            return _prefill(model, _take(text, 1, size).to(_device(model)), last_only), 0.0
        ids = _take(text, size, prompt).to(_device(model))
        return _decode(model, ids, new, step) if phase == "decode" else (_generate(model, ids, new), 0.0)

    measured: dict[str, _Measured] = {}
    with torch.inference_mode():
        for name, model in models.items():
            with PeakMemory(_device(model)) as memory, ExpertsHit(model) as seen:
                _, cache = once(model)
            cost = None
            if phase == "decode":
                cost = decode_bytes(model, size, seen.share(skip=1), cache)
            elif phase == "prefill":
                cost = prefill_flops(model, size)
            measured[name] = _Measured([], weight_bytes(model) + memory.rise, cost)
        for name, step in steps.items():
            for _ in range(2):  # the second time, a cache that was used before compiles anew
                once(models[name], step)
        for turn in range(repeats):
            for name in list(models)[:: 1 if turn % 2 == 0 else -1]:
                measured[name].speeds.append(once(models[name], steps.get(name))[0])
    return measured


def _decode(
    model: nn.Module, ids: Tensor, new_tokens: int, compiled: CompiledStep | None = None
) -> tuple[float, float]:
    """Tokens a second of `new_tokens` greedy steps for each of the B rows after the prompt `ids` (B, P); and the mean
    bytes of the key-value cache."""
    name = "cache" if accepts(model, "cache") else "past_key_values"  # the old name, deprecated in transformers 5.2x
    held = DynamicCache(config=model.config) if compiled is None else compiled.empty_cache()  # type: ignore[arg-type]
    cache: dict[str, Any] = {name: held, "use_cache": True}
    forward = model if compiled is None else compiled.forward
    step = model(input_ids=ids, **cache).logits[:, -1:].argmax(-1)  # (B, 1)
    before, start = cache_bytes(held), _now(ids.device)
    for _ in range(new_tokens):
        step = forward(input_ids=step, **cache).logits[:, -1:].argmax(-1)  # (B, 1)
    return ids.shape[0] * new_tokens / (_now(ids.device) - start), (before + cache_bytes(held)) / 2


def _generate(model: nn.Module, ids: Tensor, new_tokens: int) -> float:
    """New tokens a second of ``generate()`` on the prompts `ids` (B, P), greedy, the prompts' forward in the time."""
    start = _now(ids.device)
    model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return ids.shape[0] * new_tokens / (_now(ids.device) - start)


def _prefill(model: nn.Module, ids: Tensor, last_only: bool) -> float:
    """Tokens a second of one forward over `ids` (1, T)."""
    options: dict[str, Any] = {"logits_to_keep": 1} if last_only else {}
    if accepts(model, "use_cache"):
        options["use_cache"] = False
    start = _now(ids.device)
    model(input_ids=ids, **options)
    return ids.numel() / (_now(ids.device) - start)


def _runs(measured: Mapping[str, _Measured], phase: str, size: int, dtype: str, threads: int) -> Iterator[Run]:
    medians = {name: statistics.median(of.speeds) for name, of in measured.items()}
    dense = measured.get(DENSE)
    for name, of in measured.items():
        limit = dense.cost / of.cost if dense is not None and dense.cost and of.cost else None
        ratio = None if dense is None else medians[name] / medians[DENSE]
        quartiles = torch.tensor(of.speeds, dtype=torch.float64).quantile(
            torch.tensor([0.25, 0.75], dtype=torch.float64)
        )
        low, high = quartiles.tolist()
        yield Run(phase, size, dtype, threads, name, medians[name], (low, high), ratio, limit, of.peak, of.cost)


def _as(model: nn.Module, dtype: torch.dtype, convert: Convert | None) -> nn.Module:
    """The model itself if it has the dtype; else `convert`'s, or a copy with its floating-point parameters cast."""
    if next(model.parameters()).dtype == dtype:
        return model
    if convert is not None:
        return convert(model, dtype).eval()
    # deepcopy takes what the memo holds, so that no second copy in the old dtype ever exists and ties stay ties
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to(dtype), requires_grad=False)
        for p in model.parameters()
        if p.is_floating_point()
    }
    cast = copy.deepcopy(model, memo)
    if hasattr(cast, "config"):
        cast.config.dtype = dtype
    return cast


def _make_resident(model: nn.Module) -> None:
    """Touch every page of the weights: a file that was mapped, not read, would count as memory that a round needed."""
    for tensor in model.parameters():
        tensor.detach().reshape(-1)[:: PAGE_BYTES // tensor.element_size()].sum()


@contextmanager
def _settings_restored(models: Any) -> Iterator[None]:
    """Models in eval mode inside; the thread count and the modes as they were after."""
    threads = torch.get_num_threads()
    modes = [(model, model.training) for model in models]
    try:
        for model, _ in modes:
            model.eval()
        yield
    finally:
        torch.set_num_threads(threads)
        for model, training in modes:
            model.train(training)


def _check(
    models: Mapping[str, nn.Module],
    work: Sequence[tuple[str, int]],
    dtypes: Sequence[str],
    threads: Sequence[int],
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
) -> None:
    for dtype in dtypes:
        choose("dtype", dtype, DTYPES)
    if not (work and dtypes and threads):
        raise FactorMixError("nothing to time: give a decode batch or a prefill length, a dtype and a thread count.")
    numbers = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats}
    numbers |= {f"{phase} size": size for phase, size in work if size < 1}
    numbers["threads"] = min(threads)
    for name, number in numbers.items():
        if number < 1:
            raise FactorMixError(f"{name} received {number}; allowed: at least 1.")
    for model in models.values():
        kind = type(model).__name__
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise FactorMixError(f"{kind} is an encoder-decoder; bench times decoders and encoders. {REMEDY}")
        if any(phase != "prefill" for phase, _ in work) and not getattr(model, "can_generate", lambda: True)():
            raise FactorMixError(
                f"{kind} cannot decode: it has no next-token head. Ask for no decode batches. {REMEDY}"
            )


def _keeps_last(model: nn.Module) -> bool:
    """Whether ``logits_to_keep=1`` gives one position, by running it."""
    if not (accepts(model, "logits_to_keep") or accepts(model, "kwargs")):
        return False
    ids = torch.zeros(1, 2, dtype=torch.long, device=_device(model))
    with torch.inference_mode():
        output = model(input_ids=ids, logits_to_keep=1)
    return getattr(output, "logits", ids[..., None]).shape[1] == 1


def _take(text: Tensor, rows: int, length: int) -> Tensor:
    """(rows, length) token ids from the text (n,), one after the other, starting again at its end."""
    repeats = -(-rows * length // len(text))
    return text.repeat(repeats)[: rows * length].view(rows, length)


def _random_tokens(models: Any, seed: int) -> Tensor:
    vocab = min(int(model.get_input_embeddings().weight.shape[0]) for model in models)
    return torch.randint(vocab, (4096,), generator=torch.Generator().manual_seed(seed))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
