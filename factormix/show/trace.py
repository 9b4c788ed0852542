"""Record which experts and domains every token got at every FFN. The page is made from these data.

    found = trace(model, tokenizer, [read_documents("a.txt")])
    found.sites[3].weights        # (T, C): T tokens, C named columns

A site is one place where a router or a gate decides for each token. There are two kinds:

========  ==========================  =====================================  =====================================
kind      columns                     weights (T, C)                         scores (T, C), chosen (T, K)
========  ==========================  =====================================  =====================================
experts   "0" ... "R-1"               1 where the expert ran, else 0         the router's, best first
domains   the gate's domain names     the gate's weight of the domain, real  None
========  ==========================  =====================================  =====================================

Experts come from the `Router` of every `SparseFFN`, domains from the `DomainGate` of every `DomainFFN`. A gate that
weighs the FFN too has one more column, "frozen FFN", before the domains. Nothing is computed a second time, because
forward hooks note the decisions of the model's own forward. An FFN that runs several times in one forward (ALBERT's)
gives one site for each time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from factormix.data.text import Documents
from factormix.nn import DomainFFN, DomainGate, Router, SparseFFN
from factormix.run.errors import FactorMixError
from factormix.run.progress import progress
from factormix.show.pieces import Token, Window, cut, renumbered

SiteKind = Literal["experts", "domains"]
WINDOW = 512  # the most tokens of a window, the same as for perplexity
FFN_COLUMN = "frozen FFN"


@dataclass(frozen=True)
class SiteTrace:
    """What T tokens got at one site; the module's table explains it. Tensors are on the CPU.

    Attributes:
        name: a name for readers, such as "layer 3" or "layer 0, use 2 of 6".
        path: dotted path of the FFN module.
        kind: "experts" or "domains".
        gate: for experts the weight of a chosen output ("hard", "paper", "soft"), for domains the gate's kind.
        columns: names of the C columns.
        weights: (T, C) float32.
        scores: (T, C) float32, None for domains.
        chosen: (T, K) int64, best first, None for domains.
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
    """The tokens and what each site gave them. Row t of every site belongs to token t.

    Attributes:
        tokens: the T tokens, document after document.
        documents: name of each document that was read.
        texts: for each document, the name of the text it is from.
        sites: from front to back, experts before domains.
        whole: False if the limit on tokens ended the reading before the text's end.
    """

    tokens: tuple[Token, ...]
    documents: tuple[str, ...]
    texts: tuple[str, ...]
    sites: tuple[SiteTrace, ...]
    whole: bool


def trace(model: nn.Module, tokenizer: Any, texts: Sequence[Documents], tokens: int = 512, quiet: bool = True) -> Trace:
    """Run the model over the beginning of each text, and record the decisions of its routers and gates.

    Args:
        model: a FactorMix model or one with domain gates, with any head. An encoder-decoder reads the text in both
            stacks.
        tokenizer: the model's tokenizer.
        texts: the texts to read, each document in windows of its own.
        tokens: the most tokens of each text, special tokens included.
        quiet: show no progress line.

    Raises:
        FactorMixError: the model has neither a router nor a domain gate, a text gives no token, two texts have the
            same name, or a site did not see every token (see `record`).
    """
    check_routes(model)
    doubled = [name for name, count in Counter(text.name for text in texts).items() if count > 1]
    if doubled:
        raise FactorMixError(f"two texts have the name {doubled[0]!r}; averages are named by text, so rename one.")
    limit = min(WINDOW, _positions(model, tokenizer))
    windows: list[Window] = []
    names: list[str] = []
    sources: list[str] = []
    whole = True
    for text in texts:
        found, complete = cut(text.plain(tokenizer), tokenizer, limit, tokens)
        windows += renumbered(found, len(names))
        documents_read = found[-1].tokens[0].document + 1
        names += [text.name if len(text) == 1 else f"{text.name} {number + 1}" for number in range(documents_read)]
        sources += [text.name] * documents_read
        whole = whole and complete
    parts: list[list[SiteTrace]] = []
    for window in progress(windows, label="show", total=len(windows), quiet=quiet):
        ids = torch.tensor([window.ids])  # (1, L); each window runs alone, so that nothing is padded
        parts.append(record(model, ids, torch.ones_like(ids)))
    shown = tuple(token for window in windows for token in window.tokens)
    sites = tuple(_joined(site_parts) for site_parts in zip(*parts, strict=True))
    return Trace(shown, tuple(names), tuple(sources), sites, whole)


def record(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> list[SiteTrace]:
    """Run the model once without its head, and record what every site gave each token that is not padding.

    Args:
        model: as for `trace`.
        input_ids: (B, L) int64.
        attention_mask: (B, L), 0 on padding. Padding is left out of the result.

    Returns:
        The sites from front to back, experts before domains. Each has T = attention_mask.sum() rows, in the order of
        the batch.

    Raises:
        FactorMixError: the model has neither a router nor a domain gate, or a site did not see B * L tokens.
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
        for use, (ffn_weight, weights) in enumerate(calls[gate]):
            columns, rows = gate.domains, _real(weights, real, path)  # (T, n)
            if ffn_weight is not None:
                rows = torch.cat([_real(ffn_weight.unsqueeze(-1), real, path), rows], dim=1)  # (T, n + 1)
                columns = (FFN_COLUMN, *columns)
            sites.append(SiteTrace(_name(path, use, len(calls[gate])), path, "domains", gate.kind, columns, rows))
    return sites


def check_routes(model: nn.Module) -> tuple[dict[str, SparseFFN], dict[str, DomainGate]]:
    """The sparse FFNs that have a router, and the domain gates, by the path of their FFN.

    Raises:
        FactorMixError: the model has neither.
    """
    routers: dict[str, SparseFFN] = {}
    gates: dict[str, DomainGate] = {}
    for path, module in model.named_modules():
        if isinstance(module, SparseFFN) and module.router is not None:
            routers[path] = module
        if isinstance(module, DomainFFN) and module.gate is not None:
            gates[path] = module.gate
    if not routers and not gates:
        raise FactorMixError(
            f"nothing to show: {type(model).__name__} has no sparse FFN with a router and no FFN with a domain gate. "
            "Make experts first (factormix factor MODEL -o OUT --text FILE) and show OUT, or name adapters and their "
            "gate."
        )
    return routers, gates


def _forward(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> None:
    """Run the model in eval mode, without its head because the logits would take most of the memory."""
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
    """Select the rows of real tokens: rows (..., C) of B * L tokens -> (T, C) on the CPU, floats in float32."""
    flat = rows.detach().reshape(-1, rows.shape[-1]).cpu()  # (B * L, C)
    if len(flat) != len(real):
        raise FactorMixError(
            f"{path} saw {len(flat)} rows for {len(real)} tokens, so rows cannot be matched to tokens. Load the model "
            "with attn_implementation='sdpa' or 'eager', which do not drop padding."
        )
    return (flat.float() if flat.is_floating_point() else flat)[real]


def _name(path: str, use: int, uses: int) -> str:
    stack = next((f"{word} " for word in ("encoder", "decoder") if f"{word}.block." in path), "")
    number = re.search(r"\.(\d+)\.", f".{path}.")
    name = f"{stack}layer {number.group(1)}" if number else path
    return name if uses == 1 else f"{name}, use {use + 1} of {uses}"


def _joined(parts: Sequence[SiteTrace]) -> SiteTrace:
    """Join the parts of one site, window after window."""
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
    """The most tokens that both the model's config and the tokenizer allow at once."""
    config: Any = model.config
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(min(own or WINDOW, tokenizer.model_max_length or WINDOW))
