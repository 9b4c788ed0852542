"""Find the FFNs of a model, make each ONE module, read its weights, swap it. No code above this file knows a family.

    sites = find_sites(model)                  # front to back, on real or meta device
    for site in sites:
        isolate(model, site)                   # outputs stay bit-equal; does nothing where the FFN is one module
        sparse = build(weights(model, site))   # any module (..., H) -> (..., H)
        dense = swap(model, site, sparse)      # returns the old module

gpt2, distilbert, starcoder2, T5 and ModernBERT apply dropout inside the FFN module, so a swap removes that dropout.
BERT-like models, OPT and ALBERT apply it after the FFN, so theirs stays.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import TypeVar

from torch import nn
from transformers.pytorch_utils import Conv1D

from factormix.ffn.families import FAMILIES, FFNPaths
from factormix.ffn.site import DenseFFN, FFNSite, FFNWeights, bias_of, name_activation, rows
from factormix.run.errors import FactorMixError, nearest

M = TypeVar("M", bound=nn.Module)


def find_sites(model: nn.Module, layers: Sequence[int] | None = None) -> list[FFNSite]:
    """List the FFNs of a dense Hugging Face model, front to back.

    It reads shapes but no weight values, so a model on the meta device is enough. The FFNs may have been isolated
    already, but none may have been replaced.

    Args:
        model: base model or any head class of a family in `FAMILIES`.
        layers: the layers whose sites are returned, counted from 0 within a stack. An encoder-decoder keeps them in
            both stacks. Layers that share one FFN (ALBERT) can only be chosen together. None returns all sites.

    Raises:
        FactorMixError: the family is unknown, an FFN is not where the table says, an activation has no name, or a
            layer does not exist.
    """
    config = getattr(model, "config", None)
    model_type = str(getattr(config, "model_type", type(model).__name__))
    family = FAMILIES.get(model_type)
    if family is None:
        raise FactorMixError(_not_found(model, model_type, f"an entry {model_type!r} in the table FAMILIES"))
    config = getattr(config, "text_config", config)
    sites: list[FFNSite] = []
    for name, _ in model.named_modules():
        places = [(paths, match) for paths in family.paths if (match := _pattern(paths.at).search(name))]
        fitting = [(paths, match) for paths, match in places if _has_parts(model, name, paths)]
        if fitting:
            paths, match = fitting[0]
            used_by = _layers(paths, int(match.group(1)), config)
            sites.append(_read(model, name, paths, used_by, config, len(sites)))
        elif places:
            wanted = " or ".join(", ".join(paths.parts) for paths, _ in places)
            raise FactorMixError(
                f"{name} of this {model_type!r} model lacks the dense FFN's parts ({wanted}); it is "
                f"{type(model.get_submodule(name)).__name__}. find_sites reads dense models: call it before any swap."
            )
    if not sites:
        wanted = "; ".join(f"modules named '...{each.at}' with {', '.join(each.parts)}" for each in family.paths)
        raise FactorMixError(_not_found(model, model_type, wanted))
    return sites if layers is None else _select(sites, layers)


def isolate(model: nn.Module, site: FFNSite) -> nn.Module:
    """Make the FFN at `site` ONE module and return it. Outputs stay bit-equal, and a second call changes nothing.

    Where a family spreads the FFN over its layer, a `DenseFFN` with the original parts replaces the up projection.
    nn.Identity replaces the activation and the down projection, on this layer's instance only. This changes parameter
    names: "intermediate.dense.weight" becomes "intermediate.dense.up.weight".

    Args:
        model: changed in place.
        site: one of its sites, from `find_sites`.

    Returns:
        The module, (..., H) -> (..., H).
    """
    if not _is_isolated(model, site):
        paths, at = site.paths, model.get_submodule(site.at)
        up, act, down = (_part(at, part) for part in (paths.up, paths.act, paths.down))
        _assign(at, paths.up, DenseFFN(up, act, down).train(at.training))  # type: ignore[arg-type]
        _assign(at, paths.act, nn.Identity())
        _assign(at, paths.down, nn.Identity())
    return model.get_submodule(site.name)


def get(model: nn.Module, site: FFNSite) -> nn.Module:
    """The one module (..., H) -> (..., H) at `site`: the dense FFN, or the module that was swapped in.

    Raises:
        FactorMixError: the FFN is still spread over its layer, so `isolate` must be called first.
    """
    if not _is_isolated(model, site):
        raise FactorMixError(f"the FFN of {site.at} is still spread over its layer: call isolate(model, site) first.")
    return model.get_submodule(site.name)


def swap(model: nn.Module, site: FFNSite, module: nn.Module) -> nn.Module:
    """Replace the FFN at `site` by `module` and return the module that was there.

    It isolates the FFN first if needed. No part of the old FFN runs any more, its dropout included. It works on the
    meta device too.

    Args:
        model: changed in place.
        site: one of its sites.
        module: any module (..., H) -> (..., H).
    """
    old = isolate(model, site)
    _assign(model, site.name, module)
    return old


def weights(model: nn.Module, site: FFNSite) -> FFNWeights:
    """The weights of the dense FFN at `site`, before or after `isolate`.

    Returns:
        Views (I, H) and (I,) that share the model's storage and dtype, see `FFNWeights`.

    Raises:
        FactorMixError: the FFN is no longer the dense one, or a weight is quantised.
    """
    gate, up, down = _linears(model, site.at, site.paths)
    up_rows, up_bias = rows(up, site.name), bias_of(up)  # (I, H), or (2I, H) when fused
    down_rows = rows(down, site.name).T  # (I, H)
    if site.paths.fused:
        inner = site.inner
        return FFNWeights(
            gate=up_rows[:inner],  # (I, H), the activated half comes first
            up=up_rows[inner:],  # (I, H)
            down=down_rows,
            gate_bias=None if up_bias is None else up_bias[:inner],
            up_bias=None if up_bias is None else up_bias[inner:],
            down_bias=bias_of(down),
        )
    return FFNWeights(
        gate=None if gate is None else rows(gate, site.name),
        up=up_rows,
        down=down_rows,
        gate_bias=None if gate is None else bias_of(gate),
        up_bias=up_bias,
        down_bias=bias_of(down),
    )


def copy_structure(model: M) -> M:
    """A copy of the model with new modules around the same tensors.

    Swapping an FFN of the copy leaves the original unchanged. Writing into a tensor changes both.
    """
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)  # type: ignore[arg-type]


def dense_linears(model: nn.Module, site: FFNSite) -> tuple[nn.Module | None, nn.Module, nn.Module]:
    """The FFN's own modules (gate or None, up, down), Linear or Conv1D, before or after `isolate`.

    Raises:
        FactorMixError: the FFN is no longer the dense one.
    """
    return _linears(model, site.at, site.paths)


def _pattern(at: str) -> re.Pattern[str]:
    """Turn a pattern of the table into a regular expression for the end of a dotted name; `*` captures an index."""
    return re.compile(r"(?:^|\.)" + re.escape(at).replace(r"\*", r"(\d+)") + "$")


def _part(at: nn.Module, path: str) -> object:
    """The attribute at a dotted path below `at`, or None. It may be a plain function, as some activations are."""
    found: object = at
    for word in path.split("."):
        found = getattr(found, word, None)
    return found


def _assign(at: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, last = path.rpartition(".")
    setattr(at.get_submodule(parent), last, module)


def _dense_ffn(at: nn.Module, paths: FFNPaths) -> DenseFFN | None:
    """The DenseFFN that `isolate` put there, or None."""
    slot = _part(at, paths.up)
    return slot if paths.kind != "module" and isinstance(slot, DenseFFN) else None


def _is_isolated(model: nn.Module, site: FFNSite) -> bool:
    if site.kind == "module":
        return True
    at = model.get_submodule(site.at)
    return isinstance(_part(at, site.paths.act), nn.Identity) and isinstance(_part(at, site.paths.down), nn.Identity)


def _has_parts(model: nn.Module, name: str, paths: FFNPaths) -> bool:
    at = model.get_submodule(name)
    if _dense_ffn(at, paths) is not None:
        return True
    return all(_part(at, part) is not None for part in paths.parts) and not isinstance(
        _part(at, paths.down), nn.Identity
    )


def _linears(model: nn.Module, name: str, paths: FFNPaths) -> tuple[nn.Module | None, nn.Module, nn.Module]:
    """(gate or None, up, down) of a dense FFN, isolated or not."""
    at = model.get_submodule(name)
    dense = _dense_ffn(at, paths)
    if dense is not None:
        return None, dense.up, dense.down
    if not _has_parts(model, name, paths):
        slot = at if paths.kind == "module" else _part(at, paths.up)
        raise FactorMixError(
            f"the FFN at {name} is {type(slot).__name__}, no longer the dense one with {', '.join(paths.parts)}. "
            "Read the weights before the swap, or from the module that swap returned."
        )
    gate = None if paths.gate is None else at.get_submodule(paths.gate)
    return gate, at.get_submodule(paths.up), at.get_submodule(paths.down)


def _read(model: nn.Module, name: str, paths: FFNPaths, layers: tuple[int, ...], config: object, index: int) -> FFNSite:
    """Measure one FFN and check that its parts fit together."""
    gate, up, down = _linears(model, name, paths)
    hidden, inner = rows(down, f"{name}.{paths.down}").shape
    up_rows = 2 * inner if paths.fused else inner
    shapes = {paths.up: (rows(up, f"{name}.{paths.up}").shape, up_rows)}
    if gate is not None:
        shapes[str(paths.gate)] = (rows(gate, f"{name}.{paths.gate}").shape, inner)
    for part, (shape, want) in shapes.items():
        if tuple(shape) != (want, hidden):
            raise FactorMixError(
                f"{name}.{part} maps {shape[1]} -> {shape[0]}, but {paths.down} maps {inner} -> {hidden}, so "
                f"{hidden} -> {want} was expected: the entry in FAMILIES does not describe this model."
            )
    at = model.get_submodule(name)
    dense = _dense_ffn(at, paths)
    act = _part(at, paths.act) if dense is None else dense.act
    has_up_bias = bias_of(up) is not None
    return FFNSite(
        index=index,
        at=name,
        paths=paths,
        layers=layers,
        hidden=hidden,
        inner=inner,
        activation=name_activation(act, config, f"{name}.{paths.act}"),
        gate_bias=has_up_bias if paths.fused else gate is not None and bias_of(gate) is not None,
        up_bias=has_up_bias,
        down_bias=bias_of(down) is not None,
    )


def _layers(paths: FFNPaths, index: int, config: object) -> tuple[int, ...]:
    """The layers that run an FFN; `index` is the first index in its dotted name."""
    if not paths.grouped:
        return (index,)
    total, groups = int(getattr(config, "num_hidden_layers")), int(getattr(config, "num_hidden_groups"))  # noqa: B009
    return tuple(layer for layer in range(total) if int(layer / (total / groups)) == index)  # as ALBERT's forward


def _select(sites: list[FFNSite], layers: Sequence[int]) -> list[FFNSite]:
    """The sites of these layers, numbered as in the whole model."""
    known = {layer for site in sites for layer in site.layers}
    unknown = sorted(set(layers) - known)
    if unknown or not layers:
        raise FactorMixError(
            f"layers {list(layers)}: {unknown or 'an empty choice'} is not allowed; this model has layers 0 to "
            f"{max(known)}. Leave layers out to take them all."
        )
    chosen = [site for site in sites if set(site.layers) & set(layers)]
    for site in chosen:
        if not set(site.layers) <= set(layers):
            raise FactorMixError(
                f"layers {sorted(set(layers))}: layers {site.layers[0]} to {site.layers[-1]} share ONE FFN "
                f"({site.name}), so they change together. Choose all of them or leave layers out."
            )
    return chosen


def _not_found(model: nn.Module, model_type: str, wanted: str) -> str:
    """The message for a family that is not in the table, or whose model differs from the table."""
    seen = _candidates(model)
    pairs = "; ".join(seen[:6]) if seen else "none"
    return (
        f"cannot find the FFNs of model_type {model_type!r} ({type(model).__name__}). Looked for: {wanted}. "
        f"Linear pairs (H -> I) and (I -> H) seen: {pairs}. Known families: {', '.join(sorted(FAMILIES))}."
        f"{nearest(model_type, FAMILIES)} To add one, write one entry in factormix/ffn/families.py or at run time: "
        f"FAMILIES[{model_type!r}] = Family((FFNPaths(at='layers.*.mlp', gate='gate_proj' or None, up='up_proj', "
        "down='down_proj', act='act_fn'),)); the top of that file explains the fields."
    )


def _candidates(model: nn.Module) -> list[str]:
    """Pairs of Linears of one block, as text: the first widens, the second narrows back. Indices are written `*`."""
    shapes: dict[str, tuple[int, int]] = {}  # generic name -> (in, out)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            shapes.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", name), (module.in_features, module.out_features))
        elif isinstance(module, Conv1D):
            shapes.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", name), (module.weight.shape[0], module.weight.shape[1]))
    return [
        f"{up} ({inp} -> {out}) with {down} ({out} -> {inp})"
        for up, (inp, out) in shapes.items()
        for down, back in shapes.items()
        if back == (out, inp) and out > inp and up.rpartition("*")[0] == down.rpartition("*")[0] and "*" in up
    ]
