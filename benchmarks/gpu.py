"""Dense against sparse on a GPU: decoding, prefill and the FFN block of a model of TinyLlama-1.1B's shape.

    python benchmarks/gpu.py --json gpu.json                      # on a GPU: measures, prints tables
    python benchmarks/gpu.py                                      # without one: prints an estimate, and says so
    python benchmarks/gpu.py --device cpu --shape tiny --rounds 2 # the same code on a CPU, for a test of the script

Random weights: speed does not depend on them, quality is not looked at. Beside dense and sparse (half and a quarter of
the neurons active) runs a dense model of the sparse one's active width, the practical limit. On a GPU every decoding
step is a CUDA graph, of the eager model and of the compiled one, for both sides alike. The models take turns in every
round; numbers are medians with the range beside, ratios are medians of each round's ratio.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

from factormix.evaluate.cost import bytes_per_token, flops_per_token
from factormix.experts import gpu
from factormix.factor.assemble import sparse_spec
from factormix.ffn import find_sites, get, swap
from factormix.nn import Layout, SparseFFN, adopt

SHAPES = {
    "tinyllama": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99,
    },
}  # fmt: skip
LAYOUTS = ("S4A4E16", "S2A2E16")  # half of the neurons, a quarter
CONTEXT, STEPS = 128, 32  # tokens in the cache before a timed block of decoding steps, and steps in it
BLOCK_TOKENS = (1, 4, 16, 64, 2048)
FEW = range(1, gpu.TOKENS + 1)  # tokens of an FFN that its kernels decode: in a CUDA graph, bound by bytes
CARD = {"name": "H100 SXM", "bytes_per_s": 3.35e12, "bfloat16_flops_per_s": 989e12}  # the maker's data sheet


@dataclass(frozen=True)
class Row:
    """One contender in one setting."""

    phase: str
    """decode, prefill or ffn"""
    size: int
    """decode: batch; prefill and ffn: tokens"""
    mode: str
    """eager; graph or compiled: a CUDA graph of the eager or the compiled model; roofline: nothing was measured"""
    contender: str
    microseconds: float
    """median of a step, a forward or an FFN"""
    least: float
    most: float
    speedup: float
    """median over rounds of dense's time over this one's"""
    allowed: float
    """the same ratio by bytes (decode, few tokens of an FFN) or FLOPs (prefill)"""


def dense_model(shape: str, device: str, dtype: torch.dtype, width: float = 1.0) -> PreTrainedModel:
    """A random Llama; `width`: fraction of the FFNs' neurons it is built with."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096)
    config.intermediate_size = int(config.intermediate_size * width)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).eval()


@torch.no_grad()
def sparse_model(dense: PreTrainedModel, layout: str) -> PreTrainedModel:
    """The same with random sparse FFNs; everything else is shared with `dense`."""
    memo = {id(p): p for name, p in dense.named_parameters() if ".mlp." not in name}
    model, specs = copy.deepcopy(dense, memo), {}
    reference = next(dense.parameters())
    for site in find_sites(model):
        spec = sparse_spec(site, Layout.parse(layout), "hard")
        with torch.device(reference.device):
            ffn = SparseFFN(spec).to(reference.dtype)
        for parameter in ffn.parameters():
            parameter.normal_(std=0.02)
        swap(model, site, ffn)
        specs[site] = spec
    adopt(model, specs, {"by": "benchmarks/gpu.py, random weights"})
    return model.eval()


def contenders(shape: str, device: str, dtype: torch.dtype) -> dict[str, PreTrainedModel]:
    """Dense first: the base of every ratio."""
    dense = dense_model(shape, device, dtype)
    models = {"dense": dense}
    for layout in LAYOUTS:
        fraction = Layout.parse(layout).active_fraction
        models[layout] = sparse_model(dense, layout)
        models[f"dense of {fraction:g} width"] = dense_model(shape, device, dtype, fraction)
    return models


def graphed(step: Callable[[], object]) -> Callable[[], object]:
    """The step as a CUDA graph; warmed up first on a stream of its own, as capture asks."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def timed(run: Callable[[], object], count: int, device: str) -> float:
    """Microseconds a call, over `count` calls."""
    if device == "cpu":
        started = time.perf_counter()
        for _ in range(count):
            run()
        return 1e6 * (time.perf_counter() - started) / count
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    for _ in range(count):
        run()
    after.record()
    after.synchronize()
    return 1e3 * before.elapsed_time(after) / count


def turns(
    runs: dict[str, tuple[Callable[[], None], Callable[[], object]]], count: int, rounds: int, device: str
) -> dict[str, list[float]]:
    """Microseconds of each round after one of warm-up; each contender is (what to do before, what to time)."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in list(runs)[:: 1 if number % 2 else -1]:
            before, run = runs[name]
            before()
            took = timed(run, count, device)
            if number:
                times[name].append(took)
    return times


def rows(phase: str, size: int, mode: str, times: dict[str, list[float]], allowed: dict[str, float]) -> list[Row]:
    """Medians, ranges and ratios; the first contender is the base."""
    base = next(iter(times.values()))
    return [
        Row(
            phase, size, mode, name, statistics.median(own), min(own), max(own),
            statistics.median(b / o for b, o in zip(base, own)), allowed[name],
        )
        for name, own in times.items()
    ]  # fmt: skip


def decode_step(
    model: PreTrainedModel, batch: int, device: str, compiled: bool
) -> tuple[Callable[[], None], Callable[[], object]]:
    """(set the cache back to `CONTEXT` tokens, one greedy step). Each step moves the cache on by one token."""
    cache = StaticCache(model.config, max_cache_len=CONTEXT + STEPS + 16)
    ids = torch.randint(0, model.config.vocab_size, (batch, CONTEXT), device=device)
    model(ids, past_key_values=cache, logits_to_keep=1)
    token = ids[:, :1].clone()
    forward = torch.compile(model, fullgraph=True) if compiled else model

    def reset() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(CONTEXT)

    def step() -> object:
        token.copy_(forward(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True))
        return token

    reset()
    return reset, step if device == "cpu" else graphed(step)


def measure_decode(models: dict[str, PreTrainedModel], rounds: int, device: str, batches: tuple[int, ...]) -> list[Row]:
    """Steps of greedy decoding with a static cache."""
    found = []
    modes = {"eager": False} if device == "cpu" else {"graph": False, "compiled": True}
    for batch in batches:
        read = {name: bytes_per_token(model, batch) for name, model in models.items()}
        for mode, compiled in modes.items():
            torch._dynamo.reset()
            runs = {name: decode_step(model, batch, device, compiled) for name, model in models.items()}
            allowed = {name: read["dense"] / own for name, own in read.items()}
            found += rows("decode", batch, mode, turns(runs, STEPS, rounds, device), allowed)
    return found


def measure_prefill(models: dict[str, PreTrainedModel], rounds: int, device: str, tokens: int) -> list[Row]:
    """One forward over a window, eager, logits of the last token only."""
    ids = torch.randint(0, models["dense"].config.vocab_size, (1, tokens), device=device)
    runs = {
        name: (lambda: None, lambda model=model: model(ids, use_cache=False, logits_to_keep=1))
        for name, model in models.items()
    }
    flops = {name: flops_per_token(model, tokens / 2, head=False) for name, model in models.items()}
    allowed = {name: flops["dense"] / own for name, own in flops.items()}
    return rows("prefill", tokens, "eager", turns(runs, 3, rounds, device), allowed)


def measure_block(models: dict[str, PreTrainedModel], rounds: int, device: str, sizes: tuple[int, ...]) -> list[Row]:
    """All FFNs of a model one after another on the same states, so that no cache holds them; time of one."""
    found = []
    for tokens in sizes:
        mode = "graph" if device == "cuda" and tokens in FEW else "eager"
        runs, cost = {}, {}
        for name, model in models.items():
            ffns = [get(model, site) for site in find_sites(model)] if name not in LAYOUTS else sparse_ffns(model)
            reference = next(model.parameters())
            x = torch.randn(1, tokens, model.config.hidden_size, device=device).to(reference.dtype)

            def step(ffns: list[nn.Module] = ffns, x: torch.Tensor = x) -> object:
                return [ffn(x) for ffn in ffns]

            runs[name] = (lambda: None), graphed(step) if mode == "graph" else step
            parts = nn.ModuleList(ffns)
            cost[name] = bytes_per_token(parts, tokens) if tokens in FEW else flops_per_token(parts)
        times = turns(runs, 4, rounds, device)
        layers = models["dense"].config.num_hidden_layers
        each = {name: [t / layers for t in own] for name, own in times.items()}
        found += rows("ffn", tokens, mode, each, {name: cost["dense"] / own for name, own in cost.items()})
    return found


def sparse_ffns(model: nn.Module) -> list[nn.Module]:
    """The sparse FFNs of a model in order."""
    return [module for module in model.modules() if isinstance(module, SparseFFN)]


def estimate(models: dict[str, PreTrainedModel], batches: tuple[int, ...], tokens: int) -> list[Row]:
    """What `CARD` would need if it did nothing but read the weights (decode) or multiply (prefill): no measurement."""
    found = []
    for batch in batches:
        times = {n: [1e6 * bytes_per_token(m, batch) / CARD["bytes_per_s"]] for n, m in models.items()}
        found += rows("decode", batch, "roofline", times, {n: times["dense"][0] / t[0] for n, t in times.items()})
    times = {
        n: [1e6 * tokens * flops_per_token(m, tokens / 2, head=False) / CARD["bfloat16_flops_per_s"]]
        for n, m in models.items()
    }
    return found + rows("prefill", tokens, "roofline", times, {n: times["dense"][0] / t[0] for n, t in times.items()})


def table(found: list[Row]) -> str:
    """Markdown."""
    lines = ["| phase | size | mode | model | us | range | x dense | allowed |", "|---|--:|---|---|--:|---|--:|--:|"]
    lines += [
        f"| {r.phase} | {r.size} | {r.mode} | {r.contender} | {r.microseconds:.1f} | {r.least:.1f}-{r.most:.1f} "
        f"| {r.speedup:.2f} | {r.allowed:.2f} |"
        for r in found
    ]
    return "\n".join(lines)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one, else an estimate")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="tinyllama")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else None)
    small = options.shape == "tiny"
    batches, tokens, blocks = ((1,), 32, (1, 4)) if small else ((1, 4, 16), 2048, BLOCK_TOKENS)
    if device is None:
        print("No GPU here: an ESTIMATE, not a measurement. Assumed: every byte and FLOP the maker claims is reached,")
        print(f"launches, attention and caches cost nothing in decoding; {CARD}.\n")
        where, dtype = f"estimate for {CARD['name']}", torch.bfloat16
        found = estimate(contenders(options.shape, "meta", dtype), batches, tokens)
    else:
        where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
        models = contenders(options.shape, device, torch.bfloat16 if device == "cuda" else torch.float32)
        dtype = models["dense"].dtype
        found = measure_decode(models, options.rounds, device, batches)
        found += measure_prefill(models, options.rounds, device, tokens)
        found += measure_block(models, options.rounds, device, blocks)
    report = {
        "schema": 1,
        "shape": options.shape,
        "dtype": str(dtype)[6:],
        "where": where,
        "measured": device is not None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(", ".join(f"{key} {value}" for key, value in report.items()), table(found), sep="\n\n")
    if options.json:
        options.json.write_text(json.dumps({**report, "rows": [asdict(row) for row in found]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
