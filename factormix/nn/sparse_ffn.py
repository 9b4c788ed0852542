"""SparseFFN: a feed-forward network whose neurons are cut into shared ones and routed experts.

    y = F_shared(x) + sum over the K chosen i of s_i * E_i(x) + b_2

With K = R and s = 1 this is the dense FFN to rounding. Only the chosen experts run, for every batch, length and mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from factormix.experts import PackedExperts, compiled, gpu, native, run_experts
from factormix.nn.int8 import Int8Neurons
from factormix.nn.layout import Layout
from factormix.nn.router import Router, RouterKind, make_router
from factormix.run.errors import choose

OutputWeight = Literal["hard", "paper", "soft"]


@dataclass(frozen=True)
class SparseSpec:
    """All that decides a SparseFFN's shapes: what config.json holds for each site.

    Attributes:
        hidden: H.
        width: W, neurons of an expert; the shared part has S * W.
        shared, active, slices: S, K, E of the layout.
        activation: a key of ``ACT2FN``.
        gated: act(gate) * up, or act(up).
        up_bias, down_bias: whether the dense FFN had them.
        output_weight: what a chosen expert's output is multiplied by: "hard" 1, "paper" E / K, "soft" the sigmoid of
            its score.
        router: "linear", or the "mlp" and "neuron" of other methods (`factormix.nn.router`).
    """

    hidden: int
    width: int
    shared: int
    active: int
    slices: int
    activation: str
    gated: bool
    up_bias: bool = False
    down_bias: bool = False
    output_weight: OutputWeight = "hard"
    router: RouterKind = "linear"

    def __post_init__(self) -> None:
        choose("output_weight", self.output_weight, get_args(OutputWeight))
        choose("router", self.router, get_args(RouterKind))

    @property
    def layout(self) -> Layout:
        """S, K and E."""
        return Layout(self.shared, self.active, self.slices)

    @property
    def factor(self) -> float:
        """What a chosen expert's output is multiplied by, whatever its score: E / K for "paper", else 1."""
        return self.slices / self.active if self.output_weight == "paper" else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparseSpec:
        """The spec of `to_dict`'s values. Older directories call `output_weight` "gate".

        Raises:
            FactorMixError: an unknown output weight or kind of router.
        """
        return cls(**{"output_weight" if name == "gate" else name: value for name, value in values.items()})


class SharedNeurons(nn.Module):
    """The neurons that run for every token: one FFN of width S * W without output bias, (T, H) -> (T, H)."""

    def __init__(self, spec: SparseSpec) -> None:
        super().__init__()
        width = spec.shared * spec.width
        self.activation, self.gated = spec.activation, spec.gated
        self.up_proj = nn.Linear(spec.hidden, (2 if spec.gated else 1) * width, bias=spec.up_bias)  # gate rows first
        self.down_proj = nn.Linear(width, spec.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (T, H) -> (T, H)."""
        return cast(Tensor, self.down_proj(self.neurons(x)))

    def packed(self) -> PackedExperts:
        """The same weights as one expert that every token has chosen; no copy."""
        up, down, bias = self.up_proj.weight, self.down_proj.weight, self.up_proj.bias
        return PackedExperts(
            up.unsqueeze(0), down.unsqueeze(0), None if bias is None else bias.unsqueeze(0), self.activation, self.gated
        )

    def neurons(self, x: Tensor) -> Tensor:
        """Post-activation neurons, (T, H) -> (T, S * W)."""
        view = PackedExperts(self.up_proj.weight, self.down_proj.weight, None, self.activation, self.gated)
        return view.neurons(self.up_proj(x))


class RoutedExperts(nn.Module):
    """The packed weights of R experts, named and shaped as transformers' MoE blocks have them.

    ``gate_up_proj`` (R, 2W, H) when gated, else ``up_proj`` (R, W, H); ``down_proj`` (R, H, W);
    ``up_bias`` (R, 2W or W).
    """

    def __init__(self, spec: SparseSpec) -> None:
        super().__init__()
        routed, rows = spec.layout.routed, (2 if spec.gated else 1) * spec.width
        self.activation, self.gated = spec.activation, spec.gated
        self.up_name = "gate_up_proj" if spec.gated else "up_proj"
        self.register_parameter(self.up_name, nn.Parameter(torch.empty(routed, rows, spec.hidden)))
        self.down_proj = nn.Parameter(torch.empty(routed, spec.hidden, spec.width))
        self.up_bias = nn.Parameter(torch.empty(routed, rows)) if spec.up_bias else None

    def packed(self) -> PackedExperts:
        """The same weights as plain tensors; no copy."""
        up = getattr(self, self.up_name)
        return PackedExperts(up, self.down_proj, self.up_bias, self.activation, self.gated)

    def forward(self, x: Tensor, chosen: Tensor, scale: Tensor | None) -> Tensor:
        """x (T, H), chosen (T, K), scale (T, K) or None -> (T, H)."""
        return run_experts(x, chosen, scale, self.packed())


def _untouched(part: nn.Module | None) -> bool:
    """True for a part as it was made, whose weights alone say what it computes."""
    return part is None or (
        type(part) in (SharedNeurons, RoutedExperts, Int8Neurons, Router)
        and not _heard(part)
        and all(type(inner) is nn.Linear and not _heard(inner) for inner in part._modules.values())
    )


def _heard(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


class _Kept:
    """A SparseFFN's plan for the C++ operator, with what it was made from: to look that up for each token takes longer
    than a small FFN. What is compared for each token is laid out flat, for little of it is in a cache by then."""

    def __init__(self, ffn: SparseFFN, dtype: torch.dtype) -> None:
        parts = [part for part in (ffn.shared, ffn.experts, ffn.router) if part is not None]
        owners = [ffn, *([] if ffn.shared is None else [ffn.shared])]
        self.modules = [
            (at._modules, name, module, type(module), module.__dict__, module._forward_hooks, module._forward_pre_hooks)
            for at in owners
            for name, module in at._modules.items()
            if module is not None
        ]
        inner: list[nn.Module] = [at for part in parts for at in (part, *part._modules.values()) if at is not None]
        held: list[dict[str, Any]] = [kind for at in inner for kind in (at._parameters, at._buffers)]
        self.tensors: list[tuple[dict[str, Any], str, Tensor, int, torch.dtype]] = [
            (at, name, t, t.data_ptr(), t.dtype) for at in held for name, t in at.items() if t is not None
        ]
        self.ffn, self.spec = ffn.__dict__, ffn.spec
        said = [(ffn.router, "active"), (ffn.shared, "activation"), (ffn.experts, "activation")]
        self.said = [(part.__dict__, name, getattr(part, name)) for part, name in said if part is not None]
        experts, shared = ffn._packed()
        self.plan = native.plan(dtype, experts, shared, *ffn._routing())

    def stands(self) -> bool:
        """Whether nobody has put anything in the place of a part or a weight since, nor a hook on a part."""
        for at, name, module, kind, own, hooks, pre_hooks in self.modules:
            if at.get(name) is not module or type(module) is not kind or hooks or pre_hooks or "forward" in own:
                return False
        for held, name, tensor, address, dtype in self.tensors:
            if held.get(name) is not tensor or tensor.data_ptr() != address:
                return False
            if tensor.dtype is not dtype or not tensor.is_contiguous():
                return False
        if self.ffn["spec"] is not self.spec:
            return False
        return all([at[name] == value for at, name, value in self.said])


_KEPT: WeakKeyDictionary[SparseFFN, _Kept] = WeakKeyDictionary()


class SparseFFN(nn.Module):
    """A sparse FFN (..., H) -> (..., H) that stands where a dense one stood; see the module's equation.

    While training, a chosen expert's output is multiplied by 1 + p - detach(p), p = sigmoid(score): the value stays 1,
    and any loss on the output reaches the router.
    """

    def __init__(self, spec: SparseSpec) -> None:
        super().__init__()
        self.spec = spec
        layout = spec.layout
        self.shared = SharedNeurons(spec) if layout.shared else None
        self.router = (
            make_router(spec.router, spec.hidden, layout.routed, layout.active, spec.activation, spec.gated)
            if layout.routed
            else None
        )
        self.experts = RoutedExperts(spec) if layout.routed else None
        self.bias = nn.Parameter(torch.empty(spec.hidden)) if spec.down_bias else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (..., H) -> (..., H)."""
        y = self._by_plan(hidden_states)  # (..., H)
        if y is None:
            x = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, H)
            y = self._at_once(x)  # (T, H)
            if y is None:
                y = None if self.shared is None else self.shared(x)
                if self.experts is not None:
                    routed = self.experts(x, *self._routed(x))  # (T, H)
                    y = routed if y is None else y + routed
            assert y is not None  # Layout refuses S + K = 0
            y = y.view(hidden_states.shape)  # (..., H)
        return y if self.bias is None else y + self.bias

    def _routed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Choice and scale: x (T, H) -> (T, K), (T, K) or None."""
        assert self.router is not None
        scores, chosen = self.router(x)  # (T, R), (T, K)
        return chosen, self.scale(scores, chosen)

    def _by_plan(self, x: Tensor) -> Tensor | None:
        """All parts by the C++ operator as at the last call, (..., H) -> (..., H); None where something has changed."""
        if not native.takes(x):
            return None
        kept = _KEPT.get(self)
        if kept is not None and kept.plan.dtype is x.dtype and kept.stands():
            return native.forward(kept.plan, x)
        _KEPT.pop(self, None)
        return None

    def _at_once(self, x: Tensor) -> Tensor | None:
        """All parts at once by the C++ operator or a GPU's kernels, (T, H) -> (T, H); None where neither serves, or
        where somebody has put something of their own (an adapter, a quantised layer, a hook) in the place of a part."""
        if not (_untouched(self.shared) and _untouched(self.experts)):
            return None
        experts, shared = self._packed()
        parts = [part for part in (shared, experts) if part is not None]
        if _untouched(self.router) and compiled.serves(x, parts, None if self.router is None else self.router.weight):
            return compiled.forward(x, experts, shared, *self._routing())
        if not native.takes(x):
            if not gpu.serves(x, parts):
                return None
            chosen, scale = (None, None) if experts is None else self._routed(x)
            return gpu.decode(x, chosen, scale, experts, shared)
        if not native.serves(x, parts):
            return None
        if self.router is not None and not (_untouched(self.router) and native.routes(x, self.router.weight)):
            return native.decode(x, *self._routed(x), experts, shared)
        kept = _KEPT[self] = _Kept(self, x.dtype)
        return native.forward(kept.plan, x)

    def _packed(self) -> tuple[PackedExperts | None, PackedExperts | None]:
        """Experts and shared neurons, where there are any; no copy."""
        return (
            None if self.experts is None else self.experts.packed(),
            None if self.shared is None else self.shared.packed(),
        )

    def _routing(self) -> tuple[Tensor | None, int, int, float]:
        """The router's weight, K, and where the weights of the chosen come from, as `native.plan` has it."""
        if self.router is None:
            return None, 0, native.GIVEN, 1.0
        gate = native.SIGMOID if self.spec.output_weight == "soft" else native.CONSTANT
        return self.router.weight, self.router.active, gate, self.spec.factor

    def scale(self, scores: Tensor, chosen: Tensor) -> Tensor | None:
        """What each chosen expert's output is multiplied by: (T, R), (T, K) -> (T, K), or None for 1."""
        straight_through = self.training and torch.is_grad_enabled()
        if self.spec.output_weight == "hard" and not straight_through:
            return None
        p = scores.gather(1, chosen).sigmoid()  # (T, K)
        if self.spec.output_weight == "soft":
            return p
        factor = self.spec.factor
        return factor * (1 + p - p.detach()) if straight_through else torch.full_like(p, factor)

    def active_neurons(self, hidden_states: Tensor) -> Tensor:
        """Post-activation neurons in packed order, shared ones first: (..., H) -> (..., I), I = (S + R) * W.

        The neurons of experts that the token did not choose are zero; gates are not applied.
        """
        x = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, H)
        parts = [] if self.shared is None else [self.shared.neurons(x)]  # (T, S * W)
        if self.router is not None and self.experts is not None:
            _, chosen = self.router(x)  # (T, K)
            packed = self.experts.packed()
            for i in range(self.spec.layout.routed):
                rows = (chosen == i).any(-1).nonzero()[:, 0]  # (T_i,)
                neurons = packed.expert_neurons(i, x[rows])  # (T_i, W)
                parts.append(neurons.new_zeros(len(x), self.spec.width).index_copy(0, rows, neurons))  # (T, W)
        return torch.cat(parts, dim=-1).view(*hidden_states.shape[:-1], -1)  # (..., I)

    def active_parameters(self) -> int:
        """Number of parameters that one token uses."""
        total = sum(p.numel() for p in self.parameters())
        if self.experts is None:
            return total
        routed = sum(p.numel() for p in self.experts.parameters())
        return total - routed + routed * self.spec.active // self.spec.layout.routed
