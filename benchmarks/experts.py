"""One FFN, dense against each path of the experts, by the number of tokens: what `experts/dispatch.py` chooses by.

    OMP_NUM_THREADS=1 python benchmarks/experts.py [HIDDEN INNER LAYOUT]

Random weights of a gated FFN (by default SmolLM2's shape), several copies in turn so that no cache holds them; median
microseconds a call of the routed experts alone, and of a dense FFN of all neurons.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from factormix.experts import PackedExperts
from factormix.experts.grouped import grouped
from factormix.experts.tokenwise import tokenwise
from factormix.nn import Layout

COPIES, ROUNDS = 16, 5


def median_us(calls: list[Callable[[], object]]) -> float:
    """Median over rounds and calls, after one round of warm-up."""
    times = []
    for round_ in range(ROUNDS + 1):
        for call in calls:
            started = time.perf_counter()
            call()
            if round_:
                times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times)


def dense_ffn(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """x (T, H), up (2I, H), down (H, I) -> (T, H)."""
    gate, value = F.linear(x, up).chunk(2, dim=-1)  # (T, I) each
    return F.linear(F.silu(gate) * value, down)


@torch.no_grad()
def main(hidden: int = 576, inner: int = 1536, layout: str = "S4A4E16") -> None:
    cut = Layout.parse(layout)
    width = cut.width(inner)
    print(f"H {hidden}, I {inner}, {cut}, {torch.get_num_threads()} thread(s); microseconds")
    print(f"{'dtype':<10}{'tokens':>7}{'dense':>10}{'tokenwise':>11}{'grouped':>10}")
    for dtype in (torch.float32, torch.bfloat16):
        dense = [
            (torch.randn(2 * inner, hidden).to(dtype), torch.randn(hidden, inner).to(dtype)) for _ in range(COPIES)
        ]
        packs = [
            PackedExperts(
                torch.randn(cut.routed, 2 * width, hidden).to(dtype),
                torch.randn(cut.routed, hidden, width).to(dtype),
                None,
                "silu",
                True,
            )
            for _ in range(COPIES)
        ]
        for tokens in (1, 2, 4, 8, 16, 64, 512):
            x = torch.randn(tokens, hidden).to(dtype)
            chosen = torch.rand(tokens, cut.routed).topk(cut.active, dim=1).indices  # (T, K)

            row = [
                median_us([partial(dense_ffn, x, *w) for w in dense]),
                median_us([partial(tokenwise, x, chosen, None, p) for p in packs]),
                median_us([partial(grouped, x, chosen, None, p) for p in packs]),
            ]
            print(f"{str(dtype)[6:]:<10}{tokens:>7}{row[0]:>10.0f}{row[1]:>11.0f}{row[2]:>10.0f}")


if __name__ == "__main__":
    main(*(kind(value) for kind, value in zip((int, int, str), sys.argv[1:])))
