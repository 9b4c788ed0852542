"""What every token was given at every FFN: the data behind the page, the same for experts and for domains.

    found = trace(model, tokenizer, [read_documents("a.txt")])
    found.sites[3].weights        # (T, C): T tokens, C named columns

A site is one place where a token meets a choice. Two kinds:

========  ==========================  =====================================  =====================================
kind      columns                     weights (T, C)                         scores (T, C), chosen (T, K)
========  ==========================  =====================================  =====================================
experts   "0" ... "R-1"               1 where the expert fired, else 0       the router's, best first
domains   the gate's domain names     the gate's weight of the domain, real  None
========  ==========================  =====================================  =====================================

Experts are read from the `Router` of every `SparseFFN`. Domains are read from any module that keeps `DomainGated`'s
protocol; where its gate weighs the FFN too, that is one more column, "frozen FFN", before the domains. Nothing is
computed here a second time: forward hooks note what the model's own forward decided. An FFN that runs several times in
one forward (ALBERT's) is one site a use.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from factormix.data.text import Documents
from factormix.nn import Router, SparseFFN
from factormix.run.errors import FactorMixError
from factormix.run.progress import progress
from factormix.show.pieces import Token, Window, cut, renumbered

SiteKind = Literal["experts", "domains"]
WINDOW = 512  # most tokens of a window, as the perplexity has them
FFN_COLUMN = "frozen FFN"


class Gate(Protocol):
    """A domain gate: called with the FFN's input (..., H), gives the FFN's weight (...) or None for 1, and the domains'
    weights (..., n) in the order of `domains`."""

    domains: Sequence[str]

    def __call__(self, x: Tensor) -> tuple[Tensor | None, Tensor]: ...


class DomainGated(Protocol):
    """What the collector asks of an FFN with domains: an attribute `gate` that is an nn.Module and a `Gate`. Modules
    whose `gate` has no `domains` (other models' MoE gates) are passed over."""

    gate: Gate


@dataclass(frozen=True)
class SiteTrace:
    """What T tokens were given at one site; see the module's table. Tensors are on the CPU.

    Attributes:
        name: for readers, such as "layer 3" or "layer 0, use 2 of 6".
        path: dotted path of the FFN module.
        kind: "experts" or "domains".
        gate: how a choice becomes an output: "hard", "paper", "soft" for experts, the gate's kind for domains.
        columns: names of the C columns.
        weights: (T, C) float32.
        scores: (T, C) float32, or None.
        chosen: (T, K) int64, best first, or None.
    """

    name: str
    path: str
    kind: SiteKind
    gate: str
    columns: tuple[str, ...]
    weights: Tensor
    scores: Tensor | None = None
    chosen: Tensor | None = None


@dataclass(frozen=True)
class Trace:
    """Tokens and what each site gave them; row t of every site is token t.

    Attributes:
        tokens: T of them, document after document.
        documents: name of each document that was read.
        texts: the text that each document is from, by name.
        sites: front to back, experts first.
        whole: False when `tokens` ended before the text did.
    """

    tokens: tuple[Token, ...]
    documents: tuple[str, ...]
    texts: tuple[str, ...]
    sites: tuple[SiteTrace, ...]
    whole: bool


def trace(model: nn.Module, tokenizer: Any, texts: Sequence[Documents], tokens: int = 512, quiet: bool = True) -> Trace:
    """Run the model over the beginning of each text, document by document, and note what its routers and gates chose.

    Args:
        model: a FactorMix model or one with domain gates, any head; an encoder-decoder reads the text in both stacks.
        tokenizer: its tokenizer.
        texts: what to read.
        tokens: most tokens of each text, special ones included.
        quiet: no progress line.

    Raises:
        FactorMixError: nothing in the model routes, a text gives no token, or two texts have one name.
    """
    check_routes(model)
    doubled = [name for name, count in Counter(text.name for text in texts).items() if count > 1]
    if doubled:
        raise FactorMixError(f"two texts have the name {doubled[0]!r}, by which averages are named; rename one.")
    limit = min(WINDOW, _positions(model, tokenizer))
    windows: list[Window] = []
    names: list[str] = []
    sources: list[str] = []
    whole = True
    for text in texts:
        found, all_of_it = cut(text.plain(tokenizer), tokenizer, limit, tokens)
        windows += renumbered(found, len(names))
        read = found[-1].tokens[0].document + 1  # documents of this text
        names += [text.name if len(text) == 1 else f"{text.name} {number + 1}" for number in range(read)]
        sources += [text.name] * read
        whole = whole and all_of_it
    parts: list[list[SiteTrace]] = []
    for window in progress(windows, label="show", total=len(windows), quiet=quiet):
        ids = torch.tensor([window.ids])  # (1, L): alone, so that nothing is padded
        parts.append(record(model, ids, torch.ones_like(ids)))
    shown = tuple(token for window in windows for token in window.tokens)
    sites = tuple(_joined(of) for of in zip(*parts, strict=True))
    return Trace(shown, tuple(names), tuple(sources), sites, whole)


def record(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> list[SiteTrace]:
    """One forward of the model's body, and what every site gave each token that is not padding.

    Args:
        model: as for `trace`.
        input_ids: (B, L) int64.
        attention_mask: (B, L), 0 on padding, which is left out of the result.

    Returns:
        Sites front to back, experts before domains, with T = attention_mask.sum() rows, row by row of the batch.

    Raises:
        FactorMixError: nothing in the model routes, or a site did not see B * L tokens.
    """
    routers, gates = check_routes(model)
    calls: dict[nn.Module, list[Any]] = {}
    with ExitStack() as stack:
        watched = [*(cast(Router, ffn.router) for ffn in routers.values()), *gates.values()]
        for part in watched:
            calls[part] = []
            stack.callback(part.register_forward_hook(lambda m, _, out: calls[m].append(out)).remove)
        _forward(model, input_ids, attention_mask)
    real = attention_mask.bool().flatten().cpu()  # (B * L,)
    sites: list[SiteTrace] = []
    for path, ffn in routers.items():
        uses = calls[cast(Router, ffn.router)]
        for use, (scores, chosen) in enumerate(uses):
            rows, picked = _real(scores, real, path), _real(chosen, real, path).long()  # (T, R), (T, K)
            fired = torch.zeros_like(rows).scatter_(1, picked, 1.0)  # (T, R)
            columns = tuple(map(str, range(rows.shape[1])))
            name = _name(path, use, len(uses))
            sites.append(SiteTrace(name, path, "experts", ffn.spec.output_weight, columns, fired, rows, picked))
    for path, gate in gates.items():
        for use, (of_ffn, weights) in enumerate(calls[gate]):
            columns, rows = tuple(map(str, cast(Gate, gate).domains)), _real(weights, real, path)  # (T, n)
            if of_ffn is not None:
                rows = torch.cat([_real(of_ffn.unsqueeze(-1), real, path), rows], dim=1)  # (T, n + 1)
                columns = (FFN_COLUMN, *columns)
            kind = str(getattr(gate, "kind", ""))
            sites.append(SiteTrace(_name(path, use, len(calls[gate])), path, "domains", kind, columns, rows))
    return sites


def check_routes(model: nn.Module) -> tuple[dict[str, SparseFFN], dict[str, nn.Module]]:
    """The sparse FFNs that have a router, and the domain gates, by path.

    Raises:
        FactorMixError: there is neither.
    """
    routers: dict[str, SparseFFN] = {}
    gates: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        gate = getattr(module, "gate", None)
        if isinstance(module, SparseFFN) and module.router is not None:
            routers[path] = module
        if isinstance(gate, nn.Module) and hasattr(gate, "domains"):
            gates[path] = gate
    if not routers and not gates:
        raise FactorMixError(
            f"nothing to show: {type(model).__name__} has no sparse FFN with a router and no FFN with a domain gate. "
            "Make experts first (factormix factor MODEL -o OUT --text FILE) and show OUT, or load a gate with its "
            "domains."
        )
    return routers, gates


def _forward(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> None:
    """Run the model without its head (its logits would be most of the memory), in eval mode."""
    body: Any = getattr(model, "base_model", model)
    device = next(model.parameters()).device
    ids, mask = input_ids.to(device), attention_mask.to(device)  # (B, L), (B, L)
    inputs = {"input_ids": ids, "attention_mask": mask}
    config: Any = model.config
    if config.is_encoder_decoder and hasattr(body, "decoder"):
        inputs |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            body(**inputs)
    finally:
        model.train(was_training)


def _real(rows: Tensor, real: Tensor, path: str) -> Tensor:
    """Rows (..., C) of B * L tokens -> those of real tokens (T, C), on the CPU, floats in float32."""
    flat = rows.detach().reshape(-1, rows.shape[-1]).cpu()  # (B * L, C)
    if len(flat) != len(real):
        raise FactorMixError(
            f"{path} saw {len(flat)} rows of the {len(real)} tokens given, so they cannot be told apart. Load the "
            "model with attn_implementation='sdpa' or 'eager', which drop no padding on the way."
        )
    return (flat.float() if flat.is_floating_point() else flat)[real]


def _name(path: str, use: int, uses: int) -> str:
    stack = next((f"{word} " for word in ("encoder", "decoder") if f"{word}.block." in path), "")
    number = re.search(r"\.(\d+)\.", f".{path}.")
    name = f"{stack}layer {number.group(1)}" if number else path
    return name if uses == 1 else f"{name}, use {use + 1} of {uses}"


def _joined(parts: Sequence[SiteTrace]) -> SiteTrace:
    """One site's windows, one after another."""
    weights = torch.cat([part.weights for part in parts])  # (T, C)
    scores = [part.scores for part in parts if part.scores is not None]
    chosen = [part.chosen for part in parts if part.chosen is not None]
    return replace(
        parts[0],
        weights=weights,
        scores=torch.cat(scores) if scores else None,  # (T, C)
        chosen=torch.cat(chosen) if chosen else None,  # (T, K)
    )


def _positions(model: nn.Module, tokenizer: Any) -> int:
    """Most tokens that model and tokenizer take at once, by their own word."""
    config: Any = model.config
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(min(own or WINDOW, tokenizer.model_max_length or WINDOW))
