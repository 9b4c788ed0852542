"""One FFN cut into many small experts: FactorMix beside transformers' own expert functions, and dense.

    OMP_NUM_THREADS=1 python benchmarks/fine_experts.py [--hidden 2048 --inner 5632] [--layout S0A8E32 ...]

All four sides take turns, several copies of the weights in turn so that no cache holds them. On transformers' sides the
router and the shared neurons are ours, by PyTorch's operators. A row of the table: median microseconds a call (and the
middle half of them), then FactorMix's speed over that of each other side.
"""

from __future__ import annotations

import argparse
import os
import statistics
from functools import partial

import torch
from experts import alternate, dense_ffn, dense_weights, sparse_ffn, spread

from factormix.evaluate.companions import stock_experts
from factormix.experts import native
from factormix.nn import Layout

BYTES = 150e6  # of copies, more than any cache
STOCK = ("grouped_mm", "eager")


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=5632)
    parser.add_argument("--layout", nargs="+", default=["S0A8E32", "S4A12E32"])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 512, 2048])
    args = parser.parse_args(arguments)
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, ", end="")
    print(f"C++ operator: {native.most_tokens() > 0}; H {args.hidden}, I {args.inner}\n")
    print("| layout | dtype | T | FactorMix, us | grouped_mm, us | eager, us | dense, us | over them |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in args.dtype:
        dtype = getattr(torch, name)
        copies = max(2, int(BYTES / (3 * args.hidden * args.inner * dtype.itemsize)))
        dense = [dense_weights(args.hidden, args.inner, dtype) for _ in range(copies)]
        for layout in args.layout:
            ours = [sparse_ffn(args.hidden, args.inner, Layout.parse(layout), dtype) for _ in range(copies)]
            stock = {kind: [stock_experts(ffn, kind) for ffn in ours] for kind in STOCK}
            for tokens in args.tokens:
                x = torch.randn(tokens, args.hidden).to(dtype)
                times = alternate(
                    *([partial(ffn, x) for ffn in side] for side in (ours, *stock.values())),
                    [partial(dense_ffn, x, *weights) for weights in dense],
                )
                medians = [statistics.median(side) for side in times]
                ratios = ", ".join(f"{other / medians[0]:.2f}" for other in medians[1:])
                print("| " + " | ".join([layout, name, str(tokens), *map(spread, times), ratios]) + " |", flush=True)


if __name__ == "__main__":
    main()
