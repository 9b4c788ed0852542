"""How often a token's experts depend on its company: alone, in a batch, left-padded; float32 and bfloat16.

    python benchmarks/flips.py MODEL TEXT

Prints the share of (token, site) pairs whose set of chosen experts differs from that of the window run alone, how many
of these are near-ties (K-th and next score less than 1e-4 apart), and how bfloat16 differs from float32.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from factormix import load
from factormix.data.packing import pack
from factormix.data.text import read_documents
from factormix.nn.router import Router

WINDOWS, WINDOW, PAD = 8, 128, 17
NEAR_TIE = 1e-4


@torch.no_grad()
def routing(model: PreTrainedModel, ids: Tensor, pad: int = 0) -> tuple[Tensor, Tensor]:
    """Windows ids (N, L) -> chosen experts (sites, N, L, K), sorted, and the gap (sites, N, L) at the K-th place."""
    seen: list[Tensor] = []
    routers = [module for module in model.modules() if isinstance(module, Router)]
    handles = [r.register_forward_hook(lambda _m, _x, out: seen.append(out[0])) for r in routers]
    filler = torch.zeros(len(ids), pad, dtype=ids.dtype)
    mask = torch.cat([torch.zeros_like(filler), torch.ones_like(ids)], 1)  # (N, P + L)
    options: dict[str, Any] = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    model(torch.cat([filler, ids], 1), use_cache=False, **options)
    for handle in handles:
        handle.remove()
    k = routers[0].active
    scores = torch.stack([s.view(len(ids), pad + ids.shape[1], -1)[:, pad:] for s in seen])  # (sites, N, L, R)
    top = scores.topk(k + 1, dim=-1)
    return top.indices[..., :k].sort(-1).values, top.values[..., k - 1] - top.values[..., k]


def compare(name: str, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    differ = (one[0] != other[0]).any(-1)  # (sites, N, L)
    ties = differ & (one[1] < NEAR_TIE)
    count, pairs = int(differ.sum()), differ.numel()
    print(f"{name:<48}{count:>6} of {pairs} pairs ({count / pairs:.2e}), {int(ties.sum())} of them near-ties")


def main(model_path: str, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    ids = pack(read_documents([text]).texts, tokenizer, WINDOW, tokens=WINDOWS * WINDOW, bos=True).input_ids
    alone: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = load(model_path, dtype=dtype)
        rows = [routing(model, row.unsqueeze(0)) for row in ids]
        alone[dtype] = (torch.cat([r[0] for r in rows], 1), torch.cat([r[1] for r in rows], 1))
        compare(f"{dtype}: alone, in a batch of {len(ids)}", alone[dtype], routing(model, ids))
        compare(f"{dtype}: alone, batch left-padded {PAD}", alone[dtype], routing(model, ids, PAD))
    compare("float32, bfloat16 (both alone)", alone[torch.float32], alone[torch.bfloat16])


if __name__ == "__main__":
    main(*sys.argv[1:3])
