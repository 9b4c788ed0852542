"""Assemble: the neurons of a dense FFN, moved into the packed weights of a sparse one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from factormix.factor.partition.assignment import Assignment
from factormix.ffn import FFNSite, FFNWeights
from factormix.nn import Layout, NeuronRouter, SparseFFN, SparseSpec


def sparse_spec(
    site: FFNSite, layout: Layout, output_weight: str, compensated: bool = False, router: str = "linear"
) -> SparseSpec:
    """The shapes of the sparse FFN that replaces the dense one at `site`; `compensated`: with an output bias anyway."""
    return SparseSpec(
        hidden=site.hidden,
        width=layout.width(site.inner),
        shared=layout.shared,
        active=layout.active,
        slices=layout.slices,
        activation=site.activation,
        gated=site.gated,
        up_bias=site.up_bias or site.gate_bias,
        down_bias=site.down_bias or compensated,
        output_weight=output_weight,  # type: ignore[arg-type]
        router=router,  # type: ignore[arg-type]
    )


@torch.no_grad()
def assemble(spec: SparseSpec, weights: FFNWeights, assignment: Assignment) -> SparseFFN:
    """A SparseFFN with the dense FFN's own weights, neurons in the assignment's order, and a router of zeros (of kind
    "neuron": of the representatives' rows at unit length, which needs no fit)."""
    with torch.device("meta"):
        ffn = SparseFFN(spec)
    ffn = ffn.to_empty(device=weights.up.device).to(weights.up.dtype)
    order = assignment.order.to(weights.up.device)
    cut = len(assignment.shared)
    up, bias = weights.stacked(), weights.stacked_biases()
    down = weights.down[order]  # (I, H), less the dropped ones
    if ffn.shared is not None:
        ffn.shared.up_proj.weight.copy_(_rows(up, order[:cut]))  # (2SW, H)
        ffn.shared.down_proj.weight.copy_(down[:cut].T)  # (H, SW)
        if bias is not None:
            ffn.shared.up_proj.bias.copy_(_rows(bias, order[:cut]))
    if ffn.experts is not None and ffn.router is not None:
        for i, neurons in enumerate(assignment.experts.to(order.device)):
            getattr(ffn.experts, ffn.experts.up_name)[i].copy_(_rows(up, neurons))  # (2W, H)
            if bias is not None and ffn.experts.up_bias is not None:
                ffn.experts.up_bias[i].copy_(_rows(bias, neurons))
        ffn.experts.down_proj.copy_(down[cut:].view(len(assignment.experts), -1, spec.hidden).transpose(1, 2))
        for parameter in ffn.router.parameters():
            parameter.zero_()
        if isinstance(ffn.router, NeuronRouter):
            assert assignment.representatives is not None
            chosen = assignment.representatives.to(order.device)  # (R,)
            ffn.router.weight.copy_(normalize(weights.up[chosen].float(), dim=1))
            if ffn.router.gate is not None and weights.gate is not None:
                ffn.router.gate.copy_(normalize(weights.gate[chosen].float(), dim=1))
    if ffn.bias is not None:
        ffn.bias.copy_(torch.zeros_like(ffn.bias) if weights.down_bias is None else weights.down_bias)
        if assignment.compensation is not None:
            ffn.bias.add_(assignment.compensation.to(ffn.bias))
    return ffn


def _rows(parts: tuple[Tensor, ...], neurons: Tensor) -> Tensor:
    """The neurons' rows of gate then up, (W or 2W, ...)."""
    return torch.cat([part[neurons] for part in parts])
