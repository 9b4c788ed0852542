"""Compute what one token costs: parameters read, bytes read, and floating-point operations.

The bytes of the weights limit decoding, floating-point operations limit prefill. The ratios of these costs, dense over
sparse, are the limits that `factormix.evaluate.speed` compares every measured speed with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from factormix.nn import SparseFFN


class Part(NamedTuple):
    """A group of parameters, and how much of it a token reads."""

    parameters: int
    """number of parameters"""
    matrix: int
    """parameters in matrices (two dimensions or more), which cost 2 FLOPs per token; norms and biases do not count"""
    bytes: int
    """bytes of all parameters"""
    active: int
    """parameters used for one token"""
    routed: int
    """parameters of the routed experts; 0 for a dense group"""
    ffn: SparseFFN | None = None
    """the sparse FFN of these parameters; None for the rest of the model"""


def parameters_per_token(model: nn.Module) -> int:
    """Number of parameters used for one token: all except idle experts and embedding tables that are only looked up.

    A table that is tied to the output head counts once, because the head reads all of it. Weights that several layers
    share (ALBERT) count once too.
    """
    return sum(part.active for part in _parts(model))


def bytes_per_token(model: nn.Module, tokens: int = 1, hit: Mapping[nn.Module, float] | None = None) -> float:
    """Bytes of weights that one decoding step reads. The key-value cache and activations do not count.

    The more sequences, the fewer experts stay idle. For an FFN that `hit` does not name, tokens are assumed to choose
    independently and evenly. Its expected idle share is then (idle share for one token) ** tokens.

    Args:
        model: any transformer.
        tokens: sequences that the step decodes, one token each.
        hit: by sparse FFN, the share of its experts that the step reads, 0 to 1, as `ExpertsHit` counted it.
    """
    total = 0.0
    for part in _parts(model):
        idle = part.parameters - part.active
        expected = part.routed * (idle / part.routed) ** tokens if part.routed else 0.0
        if hit is not None and part.ffn is not None and part.ffn in hit:
            expected = part.routed * (1 - hit[part.ffn])
        total += part.bytes * (1 - expected / part.parameters)
    return total


def flops_per_token(model: nn.Module, context: float = 0.0, head: bool = True) -> float:
    """Floating-point operations of a forward for one token: 2 for each matrix element used, plus attention.

    Args:
        model: any transformer. If `context` is not 0, `model.config` gives the size of attention.
        context: mean number of positions a token attends to, T / 2 for causal attention over T tokens. 0 leaves
            attention out.
        head: whether the output head runs for this token. Prefill needs the head for the last token only.
    """
    parts = _parts(model, skip=None if head else _output_head(model))
    # Idle parameters are taken to be matrix elements. Biases of routed experts are too few to matter.
    flops = sum(2.0 * (part.matrix - (part.parameters - part.active)) for part in parts)
    return flops + _attention_flops(model, context)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers. Tied parameters count once."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def _parts(model: nn.Module, skip: nn.Module | None = None) -> list[Part]:
    """The parameters that a forward reads: one group for each sparse FFN, and one for all the rest."""
    seen: set[int] = set()
    parts = []
    for ffn in model.modules():
        own = [p for p in ffn.parameters() if id(p) not in seen] if isinstance(ffn, SparseFFN) else []
        if isinstance(ffn, SparseFFN) and own:
            seen.update(id(p) for p in own)
            routed = sum(p.numel() for p in ffn.experts.parameters()) if ffn.experts is not None else 0
            parts.append(_part(own, ffn.active_parameters(), routed, ffn))
    rest: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding) or module is skip:
            continue
        rest.update((id(p), p) for p in module.parameters(recurse=False) if id(p) not in seen)
    own = list(rest.values())
    return [*parts, _part(own, sum(p.numel() for p in own), 0)] if own else parts


def _part(own: list[nn.Parameter], active: int, routed: int, ffn: SparseFFN | None = None) -> Part:
    return Part(
        parameters=sum(p.numel() for p in own),
        matrix=sum(p.numel() for p in own if p.dim() > 1),
        bytes=sum(p.numel() * p.element_size() for p in own),
        active=active,
        routed=routed,
        ffn=ffn,
    )


def _output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if get is not None else None


def _attention_flops(model: nn.Module, context: float) -> float:
    """FLOPs of QK^T and AV for one token: 2 products x 2 FLOPs x context x (heads x head size), over all layers."""
    config = getattr(model, "config", None)
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    if not (context and isinstance(layers, int) and isinstance(heads, int)):
        return 0.0
    size = getattr(config, "head_dim", None) or config.hidden_size // heads  # type: ignore[union-attr]
    return 4.0 * context * heads * int(size) * layers
