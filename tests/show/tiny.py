"""A text that tries to break out of the page, and a tiny model with domain adapters under gates with random weights."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from factormix.ffn import FFNSite, find_sites, isolate, swap
from factormix.nn import DomainAdapter, DomainAdapterSpec, DomainFFN, DomainGate
from tests.families import tiny_model

PIECES = ["a", "</script><script>document.title = 'broken'</script>", " <b>&amp;\"'`", "\n", "{{data}}", ""]
KINDS = ["word", "punctuation", "punctuation", "space", "word", "special"]


@torch.no_grad()
def domain_ffn(base: nn.Module, site: FFNSite, domains: tuple[str, ...], kind: str = "sigmoid") -> DomainFFN:
    """An FFN with one filled adapter for each domain, so that the gate's weights reach the layers above."""
    generator = torch.Generator().manual_seed(site.index)
    layer = DomainFFN(base, site)
    for domain in domains:
        spec = DomainAdapterSpec.of_form("ffn", "input", 3, site.hidden, site.inner, "silu", True, False)
        layer.add(domain, DomainAdapter(spec))
    gate = DomainGate(site.hidden, domains, kind)
    layer.set_gate(gate)
    for parameter in (*layer.mixda_adapters.parameters(), gate.weight):
        parameter.normal_(generator=generator)
    return layer.eval()


def with_domains(
    model: PreTrainedModel | None = None, domains: tuple[str, ...] = ("law", "medicine"), kind: str = "sigmoid"
) -> PreTrainedModel:
    """Put adapters and a gate at every FFN of a dense tiny model (a llama), in place."""
    model = tiny_model("llama") if model is None else model
    for site in find_sites(model):
        swap(model, site, domain_ffn(isolate(model, site), site, domains, kind))
    return model
