"""One FFN, dense against sparse, by the number of tokens; and where the time of one call goes.

    python benchmarks/experts.py [--hidden 2048 --inner 5632] [--layout S4A4E16 ...] [--dtype float32 ...]
    python benchmarks/experts.py --profile
    python benchmarks/experts.py --int8

Random weights of a gated FFN, several copies in turn so that no cache holds them, dense and sparse alternating. A
row of the table: median microseconds a call (and the middle half of them), dense over sparse, and the roofline: the
dense FFN's weights over those of the slices that these tokens really choose, up to 64 tokens; above, 1 / the active
fraction. With --int8, weights are int8, and four sides alternate: the dense FFN by the faster of PyTorch's two ways
(its product of int8 weights, and widening them for a plain product) and by our operator, the sparse one in int8 and,
for comparison, in `dtype`; the ratio is the faster dense side over sparse int8.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from factormix.experts import native
from factormix.ffn import copy_structure
from factormix.nn import Int8Neurons, Layout, SparseFFN, SparseSpec
from factormix.nn.int8 import rounded

BYTES = 600e6  # of copies, more than any cache
KEPT = 1.5  # seconds a row


def dense_ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """x (T, H), gate and up (I, H), down (H, I) -> (T, H): what transformers' MLP does."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def dense_weights(hidden: int, inner: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and down."""
    shapes = (inner, hidden), (inner, hidden), (hidden, inner)
    gate, up, down = ((torch.randn(shape) / shape[1] ** 0.5).to(dtype) for shape in shapes)
    return gate, up, down


def sparse_ffn(hidden: int, inner: int, cut: Layout, dtype: torch.dtype) -> SparseFFN:
    """Random weights."""
    ffn = SparseFFN(SparseSpec(hidden, cut.width(inner), cut.shared, cut.active, cut.slices, "silu", True))
    for parameter in ffn.parameters():
        parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    return ffn.to(dtype).eval()


def alternate(*sides: list[Callable[[], object]]) -> list[list[float]]:
    """Microseconds of every call of each side, the copies in turn, after a round of warm-up."""
    times: list[list[float]] = [[] for _ in sides]
    end, first = time.perf_counter() + KEPT, True
    while first or time.perf_counter() < end or len(times[0]) < 6:
        for calls in zip(*sides):
            for side, call in enumerate(calls):
                started = time.perf_counter()
                call()
                if not first:
                    times[side].append(1e6 * (time.perf_counter() - started))
        first = False
    return times


def spread(times: list[float]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(times, n=4)
    return f"{middle:.0f} ({low:.0f}-{high:.0f})"


def roofline(ffn: SparseFFN, x: Tensor) -> float:
    """Dense over sparse, at most: weights of the slices that are read, at few tokens; the active fraction, at many."""
    cut = ffn.spec.layout
    hit = cut.shared
    if ffn.router is not None:
        hit += len(ffn.router(x)[1].unique())
    return cut.slices / max(hit if len(x) <= 64 else 0, cut.shared + cut.active)


def table(
    hidden: int, inner: int, layouts: list[str], dtypes: list[str], threads: list[int], tokens: list[int]
) -> None:
    """Print the rows, Markdown."""
    print(f"H {hidden}, I {inner}\n")
    print("| layout | dtype | threads | T | dense, us | sparse, us | ratio | roofline |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in dtypes:
        dtype = getattr(torch, name)
        copies = max(2, int(BYTES / (3 * hidden * inner * dtype.itemsize)))
        dense = [dense_weights(hidden, inner, dtype) for _ in range(copies)]
        for layout in layouts:
            sparse = [sparse_ffn(hidden, inner, Layout.parse(layout), dtype) for _ in range(copies)]
            for count in threads:
                torch.set_num_threads(count)
                for t in tokens:
                    x = torch.randn(t, hidden).to(dtype)
                    a, b = alternate([partial(dense_ffn, x, *w) for w in dense], [partial(ffn, x) for ffn in sparse])
                    ratio = statistics.median(a) / statistics.median(b)
                    limit = statistics.mean(roofline(ffn, x) for ffn in sparse)
                    row = (layout, name, count, t, spread(a), spread(b), f"{ratio:.2f}", f"{limit:.2f}")
                    print("| " + " | ".join(map(str, row)) + " |", flush=True)


def int8(ffn: SparseFFN) -> SparseFFN:
    """The same with int8 weights, in place."""
    for name in ("shared", "experts"):
        part = getattr(ffn, name)
        if part is not None:
            setattr(ffn, name, Int8Neurons(part.packed()))
    return ffn


Rows = tuple[Tensor, Tensor]  # (M, N) int8, scales (M,)


def int8_product(x: Tensor, weight: Rows) -> Tensor:
    """PyTorch's own: x (T, N) -> (T, M)."""
    return torch.ops.aten._weight_int8pack_mm(x, *weight)


def widened_product(x: Tensor, weight: Rows) -> Tensor:
    """A plain product after widening: x (T, N) -> (T, M)."""
    return F.linear(x, weight[0].to(x.dtype)) * weight[1]


def pytorch_int8(x: Tensor, ffns: list[list[Rows]]) -> list[Callable[[], Tensor]]:
    """A call for each dense FFN (gate, up, down), by the way that is faster for x."""

    def by(product: Callable[[Tensor, Rows], Tensor], gate: Rows, up: Rows, down: Rows) -> Tensor:
        return product(F.silu(product(x, gate)) * product(x, up), down)

    ways = [[partial(by, product, *ffn) for ffn in ffns] for product in (int8_product, widened_product)]
    took = []
    for calls in ways:
        calls[0]()
        started = time.perf_counter()
        calls[1]()
        took.append(time.perf_counter() - started)
    return list(ways[took.index(min(took))])


def int8_table(
    hidden: int, inner: int, layouts: list[str], dtypes: list[str], threads: list[int], tokens: list[int]
) -> None:
    """Print the rows of --int8, Markdown."""
    print(f"H {hidden}, I {inner}\n")
    sides = "dense int8, PyTorch | dense int8, ours | sparse int8 | sparse, no int8"
    print(f"| layout | dtype | threads | T | {sides} | ratio | roofline |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    copies = max(2, int(BYTES / 2 / (3 * hidden * inner)))
    for name in dtypes:
        dtype = getattr(torch, name)
        dense = [dense_weights(hidden, inner, torch.float32) for _ in range(copies)]
        theirs = [[(q, scale.to(dtype)) for q, scale in map(rounded, ffn)] for ffn in dense]
        del dense
        ours = [int8(sparse_ffn(hidden, inner, Layout(1, 0, 1), dtype)) for _ in range(copies)]
        for layout in layouts:
            plain = [sparse_ffn(hidden, inner, Layout.parse(layout), dtype) for _ in range(copies)]
            sparse = [int8(copy_structure(ffn)) for ffn in plain]
            for count in threads:
                torch.set_num_threads(count)
                for t in tokens:
                    x = torch.randn(t, hidden).to(dtype)
                    ffns = ([partial(ffn, x) for ffn in side] for side in (ours, sparse, plain))
                    times = alternate(pytorch_int8(x, theirs), *ffns)
                    middle = [statistics.median(side) for side in times]
                    ratio, limit = min(middle[:2]) / middle[2], statistics.mean(roofline(ffn, x) for ffn in sparse)
                    row = (layout, name, count, t, *map(spread, times), f"{ratio:.2f}", f"{limit:.2f}")
                    print("| " + " | ".join(map(str, row)) + " |", flush=True)


def profile(hidden: int, inner: int, layouts: list[str], dtypes: list[str], threads: list[int]) -> None:
    """Print the parts of one token's call: the router and the call's fixed cost, beside the whole."""
    print(f"H {hidden}, I {inner}, one token\n")
    print("| layout | dtype | threads | weights read, MB | FFN, us | router, us | fixed cost, us | both, share |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in dtypes:
        dtype = getattr(torch, name)
        for layout in layouts:
            copies = max(2, int(BYTES / (3 * hidden * inner * dtype.itemsize)))
            cut = Layout.parse(layout)
            sparse = [sparse_ffn(hidden, inner, cut, dtype) for _ in range(copies)]
            # all but the weights: two neurons an expert
            small = [sparse_ffn(8, 2 * cut.slices, cut, dtype) for _ in range(copies)]
            x, y = torch.randn(1, hidden).to(dtype), torch.randn(1, 8).to(dtype)
            read = 3 * hidden * inner * cut.active_fraction * dtype.itemsize / 1e6
            for count in threads:
                torch.set_num_threads(count)
                whole, fixed, router, call = (
                    statistics.median(times)
                    for times in alternate(
                        [partial(ffn, x) for ffn in sparse],
                        [partial(ffn, y) for ffn in small],
                        [partial(ffn.router, x) for ffn in sparse],
                        [partial(ffn.router, y) for ffn in small],
                    )
                )
                scoring = max(0.0, router - call)  # its own arithmetic; in the FFN it shares the one call
                row = (
                    f"{read:.1f}",
                    f"{whole:.0f}",
                    f"{scoring:.1f}",
                    f"{fixed:.1f}",
                    f"{(scoring + fixed) / whole:.1%}",
                )
                print("| " + " | ".join((layout, name, str(count), *row)) + " |", flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=5632)
    parser.add_argument("--layout", nargs="+", default=["S4A4E16", "S0A2E4", "S2A2E16", "S0A1E4"])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 8, 16, 64, 512])
    parser.add_argument("--profile", action="store_true", help="the parts of one token's call")
    parser.add_argument("--int8", action="store_true", help="int8 weights, dense and sparse")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, C++ operator: {native.most_tokens() > 0}; ", end="")
    if args.profile:
        return profile(args.hidden, args.inner, args.layout, args.dtype, args.threads)
    return (int8_table if args.int8 else table)(
        args.hidden, args.inner, args.layout, args.dtype, args.threads, args.tokens
    )


if __name__ == "__main__":
    main()
