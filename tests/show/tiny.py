"""A text that tries to break out of the page; a gate and an FFN with domains by the protocol of `show.trace` alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from factormix.ffn import find_sites, isolate, swap
from tests.families import HIDDEN, tiny_model

PIECES = ["a", "</script><script>document.title = 'broken'</script>", " <b>&amp;\"'`", "\n", "{{data}}", ""]
KINDS = ["word", "punctuation", "punctuation", "space", "word", "special"]


class TinyGate(nn.Module):
    """sigmoid: the FFN's weight is 1; softmax: it is one of the weights."""

    def __init__(self, domains: tuple[str, ...], kind: str, seed: int) -> None:
        super().__init__()
        self.domains, self.kind = domains, kind
        size = (len(domains) + (kind == "softmax"), HIDDEN)
        self.weight = nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        logits = x @ self.weight.T  # (..., n or n + 1)
        if self.kind == "sigmoid":
            return None, 2 * logits.sigmoid()
        weights = logits.shape[-1] * logits.softmax(-1)
        return weights[..., 0], weights[..., 1:]


class TinyDomainFFN(nn.Module):
    """An FFN and what a domain adds to it: its own output again, so that the weights reach the layers above."""

    def __init__(self, base: nn.Module, gate: TinyGate) -> None:
        super().__init__()
        self.base_layer, self.gate = base, gate
        self.last: tuple[Tensor | None, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.gate(x)
        return self.base_layer(x) * (1 + 0.1 * self.last[1].mean(-1, keepdim=True))


def with_domains(
    model: PreTrainedModel | None = None, domains: tuple[str, ...] = ("law", "medicine"), kind: str = "sigmoid"
) -> PreTrainedModel:
    """Put a gate at every FFN of a dense tiny model (a llama), in place."""
    model = tiny_model("llama") if model is None else model
    for site in find_sites(model):
        ffn = TinyDomainFFN(isolate(model, site), TinyGate(domains, kind, site.index)).eval()
        swap(model, site, ffn)
    return model
