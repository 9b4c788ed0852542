"""DomainGate: how much of the FFN and of each domain adapter a token gets (MixDA's mixture-of-adapters gate).

One gate a site. It reads the FFN's input of ONE token and nothing else, so a token's weights are the same in any batch,
with any padding and in cached decoding. (The released code read the last position of the sequence.)

========  =========================================  ============================================
kind      weights of n domains                       weight of the FFN
========  =========================================  ============================================
sigmoid   2 * sigmoid(w_i . x - c), 1 at the start   1, fixed: a domain joins without touching the others
softmax   scaled so that the FFN starts at 1         softmax over FFN and domains
paper     unscaled softmax of an MLP                 the same; the FFN starts at 1 / (n + 1)
========  =========================================  ============================================

The scale of `softmax` is 1 + n exp(-c), which is n + 1 for c = 0. c is 0 (``start="on"``: every weight starts at 1), or
`OFF_LOGIT` (``start="off"``: domains start near 0, the model near its base).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from factormix.run.errors import FactorMixError, choose

Kind = Literal["sigmoid", "softmax", "paper"]
Start = Literal["on", "off"]
OFF_LOGIT = 6.0  # a domain starts at 2 * sigmoid(-6) = 0.005: nearly the base, and gradients still get through
PAPER_WIDTH, PAPER_DROPOUT = 768, 0.2  # the released gate's hidden layers


class DomainGate(nn.Module):
    """Weights for the FFN and for each domain, token by token: (..., H) -> (...), (..., n).

    Attributes:
        domains: names in the order of the weights.
        weight: (n, H) for sigmoid, (n + 1, H) for softmax with the FFN first; zero at the start.
        mlp: H -> 768 -> 768 -> 768 -> n + 1 for paper, where `weight` is None.

    Raises:
        FactorMixError: no domain, a domain twice, an unknown kind or start, a start other than "on" for paper.
    """

    def __init__(self, hidden: int, domains: Sequence[str], kind: Kind = "sigmoid", start: Start = "on") -> None:
        super().__init__()
        choose("gate", kind, get_args(Kind))
        choose("gate start", start, get_args(Start))
        if not domains or len(set(domains)) != len(domains):
            raise FactorMixError(f"a gate needs domains, each once; received {list(domains)}.")
        if kind == "paper" and start != "on":
            raise FactorMixError("gate 'paper' starts as its MLP does; start 'off' goes with sigmoid and softmax.")
        self.hidden, self.domains, self.kind, self.start = hidden, tuple(domains), kind, start
        self.offset = OFF_LOGIT if start == "off" else 0.0  # c of the table
        outputs = len(self.domains) + (kind != "sigmoid")
        self.weight = None if kind == "paper" else nn.Parameter(torch.zeros(outputs, hidden))
        self.mlp = _mlp(hidden, outputs) if kind == "paper" else None

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """x (..., H) -> the FFN's weight (...) or None for 1, and the domains' weights (..., n); float32."""
        with torch.autocast(x.device.type, enabled=False):
            if self.mlp is not None:
                weights = self.mlp(x.float()).softmax(-1)  # (..., n + 1)
                return weights[..., 0], weights[..., 1:]
            assert self.weight is not None
            logits = nn.functional.linear(x.float(), self.weight.float())  # (..., n or n + 1)
            if self.kind == "sigmoid":
                return None, 2 * (logits - self.offset).sigmoid()
            shift = logits.new_full(logits.shape[-1:], -self.offset)  # (n + 1,)
            shift[0] = 0.0
            scale = 1 + len(self.domains) * math.exp(-self.offset)
            weights = scale * (logits + shift).softmax(-1)  # (..., n + 1)
            return weights[..., 0], weights[..., 1:]

    def extra_repr(self) -> str:
        return f"{self.kind}, start={self.start}, domains={list(self.domains)}"


def _mlp(hidden: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (hidden, PAPER_WIDTH, PAPER_WIDTH):
        layers += [nn.Linear(width, PAPER_WIDTH), nn.ReLU(), nn.Dropout(PAPER_DROPOUT)]
    return nn.Sequential(*layers, nn.Linear(PAPER_WIDTH, outputs))
