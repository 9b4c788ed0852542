"""What one token costs: parameters read, bytes read, floating-point operations, by arithmetic and by count.

Decoding one token is bound by the bytes of the weights it reads, prefill by its floating-point operations; the ratios
of these costs, dense over sparse, are the limits that `factormix.evaluate.speed` holds every measured speed against.

A module that does not use all its parameters for a token has a method ``active_parameters() -> int``, the number it
uses for one token; if it has a submodule ``experts``, that is the part chosen from. Nothing else is known of it here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


class Part(NamedTuple):
    """A group of parameters and how much of it a token reads."""

    parameters: int
    """all parameters of the group"""
    matrix: int
    """those in matrices (two dimensions or more), which cost 2 FLOPs a token each; norms and biases are left out"""
    bytes: int
    """all bytes of the group"""
    active: int
    """parameters used for one token"""
    routed: int
    """parameters among which a token's experts are chosen; 0 for a dense group"""
    module: nn.Module | None = None
    """the module that knows its active parameters; None for the rest of the model"""


def parameters_per_token(model: nn.Module) -> int:
    """Parameters used for one token: all but embedding tables that are only looked up, less the idle experts.

    A table that is tied to the output head is read whole by the head and counts once. Weights that several layers
    share (ALBERT) count once.
    """
    return sum(part.active for part in _parts(model))


def bytes_per_token(model: nn.Module, tokens: int = 1, hit: Mapping[nn.Module, float] | None = None) -> float:
    """Bytes of weights read by one forward of one step for `tokens` sequences (decoding: the batch size).

    The more tokens, the fewer experts stay idle. `hit` says the share of its experts, 0 to 1, that a step reads in each
    sparse module, as counted (`factormix.evaluate.roofline`). Where it does not, the idle share of an FFN for several
    tokens is the expectation for tokens that choose independently and evenly: (idle share for one token) ** tokens.
    Key-value cache and activations are left out.
    """
    total = 0.0
    for part in _parts(model):
        idle = part.parameters - part.active
        expected = part.routed * (idle / part.routed) ** tokens if part.routed else 0.0
        if hit is not None and part.module is not None and part.module in hit:
            expected = part.routed * (1 - hit[part.module])
        total += part.bytes * (1 - expected / part.parameters)
    return total


def flops_per_token(model: nn.Module, context: float = 0.0, head: bool = True) -> float:
    """Floating-point operations of a forward for one token: 2 for each matrix element used, and attention.

    Args:
        model: any transformer; `model.config` is read for the size of attention when `context` is not 0.
        context: positions a token attends to, on average (causal over T tokens: T / 2); 0 leaves attention out.
        head: whether the output head runs for this token (prefill needs it for the last token only).
    """
    parts = _parts(model, skip=None if head else _output_head(model))
    # the idle parameters are matrix elements (biases of routed experts, where there are some, are a rounding error)
    flops = sum(2.0 * (part.matrix - (part.parameters - part.active)) for part in parts)
    return flops + _attention_flops(model, context)


def count_flops(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> int:
    """Floating-point operations of one real forward, counted operator by operator by torch.

    Args:
        model: the model, run without gradient in the mode it is in.
        inputs: token ids ``(B, T)``, or the keyword arguments of the forward.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    return int(counter.get_total_flops())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def _parts(model: nn.Module, skip: nn.Module | None = None) -> list[Part]:
    """The parameters a forward reads in groups: each module that knows its active parameters, then all the rest."""
    seen: set[int] = set()
    parts = []
    for module in _sparse_modules(model):
        own = [p for p in module.parameters() if id(p) not in seen]
        if not own:
            continue
        seen.update(id(p) for p in own)
        parameters = sum(p.numel() for p in own)
        active = int(module.active_parameters())  # type: ignore[operator]
        experts = getattr(module, "experts", None)
        routed = sum(p.numel() for p in experts.parameters()) if isinstance(experts, nn.Module) else parameters - active
        parts.append(_part(own, active, routed, module))
    rest: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding) or module is skip:
            continue
        rest.update((id(p), p) for p in module.parameters(recurse=False) if id(p) not in seen)
    own = list(rest.values())
    return [*parts, _part(own, sum(p.numel() for p in own), 0)] if own else parts


def _part(own: list[nn.Parameter], active: int, routed: int, module: nn.Module | None = None) -> Part:
    return Part(
        parameters=sum(p.numel() for p in own),
        matrix=sum(p.numel() for p in own if p.dim() > 1),
        bytes=sum(p.numel() * p.element_size() for p in own),
        active=active,
        routed=routed,
        module=module,
    )


def _sparse_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that have ``active_parameters``, the model itself excepted."""
    for child in module.children():
        if callable(getattr(child, "active_parameters", None)):
            yield child
        else:
            yield from _sparse_modules(child)


def _output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if get is not None else None


def _attention_flops(model: nn.Module, context: float) -> float:
    """QK^T and AV for one token: 2 products x 2 FLOPs x context x (heads x head size), summed over layers."""
    config = getattr(model, "config", None)
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    if not (context and isinstance(layers, int) and isinstance(heads, int)):
        return 0.0
    size = getattr(config, "head_dim", None) or config.hidden_size // heads  # type: ignore[union-attr]
    return 4.0 * context * heads * int(size) * layers
