"""Append neurons to a dense FFN in place, or cut it to fewer neurons.

The FFN's output gains the outputs of the appended neurons, and stock transformers can load the result. A config has one
inner width for all layers, so all FFNs are made equally wide: an FFN with too few neurons to append gets zero neurons.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from factormix.ffn.site import FFNSite, FFNWeights
from factormix.ffn.surgery import dense_linears, find_sites, weights
from factormix.run.errors import FactorMixError

INNER_FIELDS = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim")


@torch.no_grad()
def widen(model: nn.Module, site: FFNSite, inner: int, extra: FFNWeights | None = None) -> FFNSite:
    """Make the dense FFN at `site` `inner` neurons wide: its own neurons, then those of `extra`, then zero neurons.

    Args:
        model: changed in place.
        site: one of its FFNs, dense.
        inner: the new I, at least the site's I plus the r neurons of `extra`.
        extra: neurons to append, each weight (r, H) and each bias (r,). Its down_bias (H,) is added to the FFN's own.
            All are cast to the FFN's dtype. None appends zero neurons only.

    Returns:
        The site with its new width.

    Raises:
        FactorMixError: the FFN is no longer dense, or it has no bias where `extra` has one.
    """
    old = weights(model, site)
    room = inner - site.inner

    def grown(own: Tensor | None, added: Tensor | None, what: str) -> Tensor | None:
        if own is None:
            if added is not None:
                raise FactorMixError(f"the FFN at {site.name} has no {what}, but the neurons to append have one.")
            return None
        added = own.new_zeros(0, *own.shape[1:]) if added is None else added.to(own)
        return torch.cat([own, added, own.new_zeros(room - len(added), *own.shape[1:])])  # (I', ...)

    more = extra or FFNWeights(up=old.up[:0], down=old.down[:0], gate=None if old.gate is None else old.gate[:0])
    new_up, new_down = grown(old.up, more.up, "up"), grown(old.down, more.down, "down")
    new_gate = grown(old.gate, more.gate, "gate")
    up_bias = grown(old.up_bias, more.up_bias, "bias on up")
    gate_bias = grown(old.gate_bias, more.gate_bias, "bias on gate")
    down_bias = old.down_bias
    if more.down_bias is not None:
        if down_bias is None:
            raise FactorMixError(f"the FFN at {site.name} has no output bias, but the neurons to append have one.")
        down_bias = down_bias + more.down_bias.to(down_bias)
    assert new_up is not None and new_down is not None
    _write(model, site, FFNWeights(new_up, new_down, new_gate, up_bias, gate_bias, down_bias))
    return dataclasses.replace(site, inner=inner)


@torch.no_grad()
def narrow(model: nn.Module, site: FFNSite, inner: int) -> FFNSite:
    """Keep only the first `inner` neurons of the dense FFN at `site`. This changes the FFN's output.

    Args:
        model: changed in place.
        site: one of its FFNs, dense.
        inner: the new I, at most the site's.

    Returns:
        The site with its new width.

    Raises:
        FactorMixError: the FFN is no longer dense.
    """
    old = weights(model, site)
    gate, gate_bias, up_bias = (None if t is None else t[:inner] for t in (old.gate, old.gate_bias, old.up_bias))
    _write(model, site, FFNWeights(old.up[:inner], old.down[:inner], gate, up_bias, gate_bias, old.down_bias))
    return dataclasses.replace(site, inner=inner)


def set_inner(model: PreTrainedModel, old: int, new: int) -> None:
    """Write the new inner width into the model's config, and check that a stock model of that config has it everywhere.

    Args:
        model: its config is changed in place.
        old: I before.
        new: I of every FFN now.

    Raises:
        FactorMixError: no field of the config holds the width, or a model built from the config has another width.
    """
    config = model.config.get_text_config()
    for name in INNER_FIELDS:
        before = getattr(config, name, "absent")
        if before not in (old, None):  # None: gpt2's n_inner, where the width is 4 H
            continue
        setattr(config, name, new)
        with torch.device("meta"):
            found = {site.inner for site in find_sites(type(model)(model.config))}
        if found == {new}:
            return
        setattr(config, name, before)
    raise FactorMixError(
        f"a {model.config.model_type!r} config has no single field for the FFNs' width {old} (looked for "
        f"{', '.join(INNER_FIELDS)}), so a stock checkpoint cannot be {new} wide. Use the adapter unmerged."
    )


def _write(model: nn.Module, site: FFNSite, new: FFNWeights) -> None:
    """Give the dense FFN at `site` new weights, of any width."""
    gate, up, down = dense_linears(model, site)
    if site.paths.fused:
        assert new.gate is not None
        biased = new.up_bias is not None and new.gate_bias is not None
        bias = torch.cat([new.gate_bias, new.up_bias]) if biased else None  # type: ignore[list-item]  # (2I',)
        _put(up, torch.cat([new.gate, new.up]), bias)  # (2I', H)
    else:
        _put(up, new.up, new.up_bias)
        if gate is not None and new.gate is not None:
            _put(gate, new.gate, new.gate_bias)
    _put(down, new.down.T, new.down_bias)


def _put(linear: nn.Module, rows: Tensor, bias: Tensor | None) -> None:
    """Give a Linear or Conv1D the weight `rows` (out, in) and the bias (out,); a bias of None keeps the old one."""
    out, into = rows.shape
    trains = linear.weight.requires_grad  # type: ignore[union-attr]
    stored = rows.T if isinstance(linear, Conv1D) else rows  # Conv1D holds (in, out)
    linear.weight = nn.Parameter(stored.contiguous(), requires_grad=trains)  # type: ignore[arg-type]
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=trains)  # type: ignore[arg-type]
    if isinstance(linear, Conv1D):
        linear.nf, linear.nx = out, into
    elif isinstance(linear, nn.Linear):
        linear.out_features, linear.in_features = out, into
