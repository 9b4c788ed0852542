"""Make a container's state dict from a factored model: scaled routers, padded experts, folded weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from factormix.export.container import Block, Container
from factormix.export.needs import Needs
from factormix.export.router_scale import RouterScale
from factormix.nn import SparseFFN, SparseSpec

FFN = ".mlp."  # the FFN's name below a layer, in all families of `BACKBONES`


def container_state(
    model: PreTrainedModel, container: Container, needs: Needs, scale: RouterScale
) -> dict[str, Tensor]:
    """Every tensor of the exported model by transformers' names. Tensors outside the FFNs are shared with `model`."""
    state = {name: tensor for name, tensor in model.state_dict().items() if FFN not in name}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for layer, ffn in enumerate(model.sparse_ffns().values()):  # type: ignore[operator]
        named = container.tensors(block(ffn, container, needs, scale, layer))
        state |= {f"model.layers.{layer}.{name}": tensor for name, tensor in named.items()}
    if container.qkv_zeros:
        for name in [n for n in state if n.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
            state.setdefault(name.replace(".weight", ".bias"), state[name].new_zeros(len(state[name])))
    return state


@dataclass(frozen=True)
class Folded:
    """Factors of down projections in a container.

    Attributes:
        expert: factor of an expert's down projection.
        shared: factor of the shared neurons' down projection, if they are copied into every expert.
    """

    expert: float
    shared: float


def folded(spec: SparseSpec, container: Container, needs: Needs, scale: RouterScale, layer: int) -> Folded:
    """The factors of one layer: FactorMix's weight of a chosen expert divided by the container's."""
    gain = container.scoring(needs).gain(needs.active, needs.routed)
    own = {"hard": 1.0, "paper": spec.slices / needs.active, "soft": scale.means[layer] if needs.mean_gate else 1.0}
    return Folded(gain * own[spec.output_weight], gain / needs.active)


@torch.no_grad()
def block(ffn: SparseFFN, container: Container, needs: Needs, scale: RouterScale, layer: int) -> Block:
    """The tensors of one sparse FFN in the form that containers use."""
    assert ffn.experts is not None and ffn.router is not None  # `read_needs` refuses FFNs that route nothing
    spec, factor = ffn.spec, folded(ffn.spec, container, needs, scale, layer)
    gate_up = _widened(getattr(ffn.experts, ffn.experts.up_name), needs.width)  # (R, 2W, H)
    down = pad(_times(ffn.experts.down_proj, factor.expert), (0, needs.width - spec.width))  # (R, H, W)
    shared_gate_up = shared_down = None
    if needs.shared:
        own = ffn.shared
        up = gate_up.new_zeros(0, spec.hidden) if own is None else own.up_proj.weight
        low = gate_up.new_zeros(spec.hidden, 0) if own is None else own.down_proj.weight
        shared_gate_up = _widened(up, needs.shared)  # (2S, H)
        shared_down = pad(low, (0, needs.shared - low.shape[1]))  # (H, S)
    if needs.copy_shared and shared_gate_up is not None and shared_down is not None:
        routed = len(gate_up)
        gate_up = _joined(gate_up, shared_gate_up.expand(routed, -1, -1))  # (R, 2(W + S), H)
        copied = _times(shared_down, factor.shared).expand(routed, -1, -1)  # (R, H, S)
        down, shared_gate_up, shared_down = torch.cat([down, copied], dim=-1), None, None
    return Block(scale.rows(ffn.router.weight, layer), gate_up, down, shared_gate_up, shared_down)


def _widened(gate_up: Tensor, width: int) -> Tensor:
    """Add zero neurons after the gate rows and after the up rows: (..., 2W', H) -> (..., 2W, H)."""
    gate, up = gate_up.chunk(2, dim=-2)  # (..., W', H) each
    rows = (0, 0, 0, width - gate.shape[-2])
    return gate_up if not rows[3] else torch.cat([pad(gate, rows), pad(up, rows)], dim=-2)


def _joined(one: Tensor, other: Tensor) -> Tensor:
    """Join two gate-up tensors: (R, 2W, H), (R, 2S, H) -> (R, 2(W + S), H)."""
    return torch.cat([half for pair in zip(one.chunk(2, dim=-2), other.chunk(2, dim=-2)) for half in pair], dim=-2)


def _times(weight: Tensor, factor: float) -> Tensor:
    """weight x factor, rounded once. A factor of 1 returns the same tensor."""
    return weight if factor == 1.0 else (weight.float() * factor).to(weight.dtype)
