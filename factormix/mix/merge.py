"""Merge: the neurons of an `ffn` adapter with a fixed weight w become neurons of the FFN itself.

    F(x) + w A(x) = act(x [W_gate; V_gate]) * (x [W_up; V_up]) [W_down; w V_down]

The result is exact to rounding, and running it needs no FactorMix. A dense model becomes a dense checkpoint of width
I' >= I + r. Its FFNs without an adapter get zero neurons, because a config has one width for all FFNs. In a factored
model the neurons join the shared part of the adapted FFNs. Adapters that would not merge exactly are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from factormix.ffn import FFNSite, FFNWeights, get, set_inner, swap, widen
from factormix.mix.adapter_files import WEIGHTS, check_shapes, read_adapter_config
from factormix.mix.base_identity import check_base, identity_at
from factormix.mix.sizes import ALIGN
from factormix.nn import DomainAdapterSpec, FactorMixMixin, SparseFFN, SparseSpec, sites_of
from factormix.run.errors import FactorMixError
from factormix.run.tensors import read_tensors


@dataclass(frozen=True)
class Merged:
    """What a merge added to a model.

    Attributes:
        inner: new width I' of a dense model's FFNs; in a factored model, neurons of all slices of the widest adapted
            FFN.
        neurons: neurons of adapters that were added, over all sites.
        zero_neurons: zero neurons that were added as padding.
        parameters: parameters that were added.
        bytes: bytes that were added, in the model's dtype.
        flops_per_token: FLOPs that were added for one token.
    """

    inner: int
    neurons: int
    zero_neurons: int
    parameters: int
    bytes: int
    flops_per_token: int

    def __str__(self) -> str:
        return (
            f"{self.neurons} neurons and {self.zero_neurons} zero neurons appended, width {self.inner}: "
            f"{self.bytes:,} bytes and {self.flops_per_token:,} FLOPs per token more"
        )


def merge_adapters(model: PreTrainedModel, adapters: Sequence[tuple[str | Path, float]]) -> Merged:
    """Merge adapter directories into a dense or FactorMix model, in place.

    Args:
        model: the base the adapters were made from, without PEFT's wrapper.
        adapters: pairs (directory, fixed weight w).

    Returns:
        What was added.

    Raises:
        FactorMixError: an adapter was made for another model, was made on another base of the same shapes, or does not
            merge exactly; the message gives the reason.
    """
    sites = {site.index: site for site in sites_of(model)}
    parts: dict[int, list[FFNWeights]] = {}
    for folder, weight in adapters:
        for index, part in read_neurons(model, list(sites.values()), folder, weight).items():
            parts.setdefault(index, []).append(part)
    extra = {sites[index]: _joined(site_parts) for index, site_parts in sorted(parts.items())}
    before = model.num_parameters()
    if isinstance(model, FactorMixMixin):
        inner, added = _into_shared(model, extra)
    else:
        inner, added = _into_dense(model, list(sites.values()), extra)
    neurons = sum(len(site_neurons.up) for site_neurons in extra.values())
    parameters = model.num_parameters() - before
    return Merged(
        inner=inner,
        neurons=neurons,
        zero_neurons=sum(added.values()) - neurons,
        parameters=parameters,
        bytes=parameters * model.dtype.itemsize,
        flops_per_token=sum(2 * (3 if s.gated else 2) * s.hidden * n * s.use_count for s, n in added.items()),
    )


def read_neurons(
    model: PreTrainedModel, sites: Sequence[FFNSite], folder: str | Path, weight: float
) -> dict[int, FFNWeights]:
    """Read the adapters of a directory as neurons of their FFNs.

    Args:
        model: the base.
        sites: all of its FFNs.
        folder: the adapter's directory.
        weight: fixed weight of the adapter's outputs.

    Returns:
        By site index, neurons whose outputs are multiplied by `weight`.

    Raises:
        FactorMixError: the adapter was made for another model or on another base, or its neurons are not exactly
            neurons of the FFN.
    """
    config = read_adapter_config(folder)
    tensors = read_tensors(Path(folder) / WEIGHTS)
    found: dict[int, FFNWeights] = {}
    adapted = check_shapes(config, sites, folder)
    for site in adapted:
        spec = DomainAdapterSpec(**(config.sites or {})[str(site.index)])
        if reason := why_not(spec, site):
            raise FactorMixError(f"adapter {str(folder)!r} does not merge exactly: {reason}.")
        mark = f"base_model.model.{site.name}.mixda_adapters."
        own = {name.removeprefix(mark): tensor for name, tensor in tensors.items() if name.startswith(mark)}
        found[site.index] = _as_neurons(own, spec, weight, folder)
    check_base(config.base_ffns, identity_at(model, adapted), folder)
    return found


def why_not(spec: DomainAdapterSpec, site: FFNSite) -> str:
    """Why an adapter's neurons are not of the same kind as this FFN's; "" if they are."""
    kind, own = _neuron_kind(spec.gated, spec.activation), _neuron_kind(site.gated, site.activation)
    remedy = "inject it with --form ffn to merge it"
    if spec.reads == "neurons":
        return f"it reads the FFN's neurons, so its own neurons come after them and not beside them; {remedy}"
    if kind != own:
        return f"its neurons are {kind}, but the FFN's are {own}; {remedy}"
    if spec.in_bias and not (site.up_bias or site.gate_bias):
        return f"its neurons have biases, but the FFN's at {site.name} have none; {remedy}"
    if spec.out_bias and not site.down_bias:
        return f"it has an output bias, but the FFN at {site.name} has none; {remedy}"
    return ""


def _neuron_kind(gated: bool, activation: str) -> str:
    return f"{'gated' if gated else 'plain'} {activation}"


def _as_neurons(own: Mapping[str, Tensor], spec: DomainAdapterSpec, weight: float, folder: str | Path) -> FFNWeights:
    """An adapter's tensors as FFNWeights, whose rows (r, H) are neurons."""
    biases_wanted = {"in_bias": spec.in_bias, "out_bias": spec.out_bias}
    wanted = {"in_proj", "out_proj", *(name for name, exists in biases_wanted.items() if exists)}
    if set(own) != wanted:
        raise FactorMixError(
            f"adapter {str(folder)!r} holds the tensors {sorted(own)}; allowed: {sorted(wanted)}. Copy or make it "
            "again."
        )
    rows = own["in_proj"].split(spec.width)  # gate and up, or up: (r, H) each
    biases = own["in_bias"].split(spec.width) if spec.in_bias else (None,) * len(rows)  # (r,) each
    return FFNWeights(
        up=rows[-1],
        down=weight * own["out_proj"].T,  # (r, H)
        gate=rows[0] if spec.gated else None,
        up_bias=biases[-1],
        gate_bias=biases[0] if spec.gated else None,
        down_bias=weight * own["out_bias"] if spec.out_bias else None,
    )


def _joined(parts: Sequence[FFNWeights]) -> FFNWeights:
    """Join the neurons of several adapters at one FFN."""

    def together(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    outputs = [part.down_bias for part in parts if part.down_bias is not None]
    return FFNWeights(
        up=torch.cat([part.up for part in parts]),  # (r_1 + r_2 + ..., H)
        down=torch.cat([part.down for part in parts]),
        gate=together("gate"),
        up_bias=together("up_bias"),
        gate_bias=together("gate_bias"),
        down_bias=torch.stack(outputs).sum(0) if outputs else None,
    )


def _into_dense(
    model: PreTrainedModel, sites: Sequence[FFNSite], extra: Mapping[FFNSite, FFNWeights]
) -> tuple[int, dict[FFNSite, int]]:
    """Widen every FFN of a dense model. Returns I' and how many neurons each FFN gained."""
    old = {site.inner for site in sites}
    if len(old) > 1:
        raise FactorMixError(f"the FFNs of this model have widths {sorted(old)}; allowed: one width for all FFNs.")
    width = old.pop()
    least = width + max(len(neurons.up) for neurons in extra.values())
    inner = least if least % ALIGN[0] == 0 else -(-least // ALIGN[1]) * ALIGN[1]
    set_inner(model, width, inner)
    for site in sites:
        widen(model, site, inner, extra.get(site))
    return inner, {site: inner - width for site in sites}


@torch.no_grad()
def _into_shared(model: PreTrainedModel, extra: Mapping[FFNSite, FFNWeights]) -> tuple[int, dict[FFNSite, int]]:
    """Widen the shared part of the adapted FFNs of a factored model by whole slices, filled up with zero neurons.

    Returns:
        The number of neurons of the widest adapted FFN, and how many neurons each gained.
    """
    inner, added = 0, {}
    for site, neurons in extra.items():
        ffn = get(model, site)
        if not isinstance(ffn, SparseFFN):
            raise FactorMixError(
                f"the FFN at {site.name} of this factored model is dense, and widening it would change the config of "
                "all FFNs. Factor all layers that have an adapter, or use the adapter unmerged."
            )
        if ffn.spec.output_weight == "paper":
            raise FactorMixError(
                "output weight 'paper' multiplies every expert by E / K, and E grows with the shared part. Factor the "
                "model with --output-weight hard to merge adapters into it."
            )
        new = _with_shared(ffn, neurons)
        swap(model, site, new)
        model.config.factormix["sites"][str(site.index)] = new.spec.to_dict()
        inner = max(inner, new.spec.slices * new.spec.width)
        added[site] = (new.spec.slices - ffn.spec.slices) * new.spec.width
    return inner, added


def _with_shared(ffn: SparseFFN, extra: FFNWeights) -> SparseFFN:
    """A sparse FFN with the same parts and r more shared neurons, in ceil(r / W) more slices."""
    slices = -(-len(extra.up) // ffn.spec.width)
    spec: SparseSpec = replace(ffn.spec, shared=ffn.spec.shared + slices, slices=ffn.spec.slices + slices)
    like = next(ffn.parameters())
    with torch.device("meta"):
        new = SparseFFN(spec)
    new = new.to_empty(device=like.device).to(like.dtype)
    for part in ("router", "experts", "bias"):  # the same tensors, because only the shared part changes
        setattr(new, part, getattr(ffn, part))
    if extra.down_bias is not None and new.bias is not None:
        new.bias = nn.Parameter(new.bias + extra.down_bias.to(new.bias))
    assert new.shared is not None
    old, grown = ffn.shared, new.shared
    parts = [("gate", "gate_bias"), ("up", "up_bias")] if spec.gated else [("up", "up_bias")]
    width, room = (s.shared * s.width for s in (ffn.spec, spec))
    for place, (rows, bias) in enumerate(parts):
        to_rows, from_rows = slice(place * room, (place + 1) * room), slice(place * width, (place + 1) * width)
        own = None if old is None else old.up_proj
        _fill(grown.up_proj.weight[to_rows], None if own is None else own.weight[from_rows], getattr(extra, rows))
        if spec.up_bias:
            _fill(grown.up_proj.bias[to_rows], None if own is None else own.bias[from_rows], getattr(extra, bias))
    _fill(grown.down_proj.weight.T, None if old is None else old.down_proj.weight.T, extra.down)
    return new.train(ffn.training)


def _fill(target: Tensor, own: Tensor | None, added: Tensor | None) -> None:
    """Write the own rows, then the added rows, then zeros into `target` (rows, ...)."""
    target.zero_()
    first = 0 if own is None else len(own)
    if own is not None:
        target[:first] = own
    if added is not None:
        target[first : first + len(added)] = added.to(target)
