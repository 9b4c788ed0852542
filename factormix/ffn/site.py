"""One view of any FFN: where it is (`FFNSite`), its weights (`FFNWeights`), and its form as one module (`DenseFFN`).

Shapes: H hidden size, I inner width, T tokens. A neuron is one index of I; every weight here has neurons as its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from factormix.ffn.families import FFNPaths, Kind, Stack
from factormix.run.errors import FactorMixError

Activation = Callable[[Tensor], Tensor]

# Tried in this order when the config does not name the activation, most usual first. Activations with trainable
# parameters are not listed, because a name alone does not say their values.
NAMED_ACTIVATIONS = (
    "silu gelu gelu_new gelu_pytorch_tanh relu quick_gelu relu2 gelu_fast gelu_python gelu_python_tanh gelu_accurate "
    "gelu_10 relu6 tanh sigmoid mish linear laplace leaky_relu hardswish"
).split()
CONFIG_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "dense_act_fn", "activation")


@dataclass
class FFNWeights:
    """The weights of one FFN; each row is one neuron.

    Every tensor is a detached view of the model's own storage, not a copy, so writing into it changes the model. Its
    dtype is the model's.

    Attributes:
        gate: (I, H), or None for a plain FFN.
        up: (I, H).
        down: (I, H), the transpose of the down projection.
        gate_bias, up_bias: (I,) or None.
        down_bias: (H,) or None.
    """

    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def stacked(self) -> tuple[Tensor, ...]:
        """The input weights in the order in which experts pack them: gate and up, or up alone, each (I, H)."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    def stacked_biases(self) -> tuple[Tensor, ...] | None:
        """The biases of `stacked`, each (I,). A missing one is zeros if the other exists; None if neither does."""
        biases = (self.up_bias,) if self.gate is None else (self.gate_bias, self.up_bias)
        if all(bias is None for bias in biases):
            return None
        return tuple(self.up.new_zeros(len(self.up)) if bias is None else bias for bias in biases)

    def neurons(self, x: Tensor, act: Activation) -> Tensor:
        """Post-activation neurons: ``act(gate) * up`` or ``act(up)``; x (..., H) -> (..., I)."""
        up = nn.functional.linear(x, self.up, self.up_bias)  # (..., I)
        if self.gate is None:
            return act(up)
        return act(nn.functional.linear(x, self.gate, self.gate_bias)) * up  # (..., I)

    def forward(self, x: Tensor, act: Activation) -> Tensor:
        """The whole FFN without dropout: x (..., H) -> (..., H)."""
        neurons = self.neurons(x, act).to(self.down.dtype)  # (..., I); T5 keeps down in float32
        return nn.functional.linear(neurons, self.down.T, self.down_bias)  # (..., H)


class DenseFFN(nn.Module):
    """A plain FFN as ONE module, ``down(act(up(x)))``: x (..., H) -> (..., H), built from the family's own parts.

    `isolate` puts it where a family spreads its FFN over the layer. It holds no dropout, because such families apply
    dropout outside of the FFN, after down.

    Args:
        up: maps (..., H) to (..., I).
        act: the activation, (..., I) -> (..., I).
        down: maps (..., I) to (..., H).
    """

    def __init__(self, up: nn.Module, act: Activation, down: nn.Module) -> None:
        super().__init__()
        self.up = up
        self.act = act
        self.down = down

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (..., H) -> (..., H)."""
        return cast(Tensor, self.down(self.act(self.up(hidden_states))))


@dataclass(frozen=True)
class FFNSite:
    """Where one FFN of a model is and what it looks like. Plain data: it can be pickled and outlives the model.

    Attributes:
        index: position among the model's sites, front to back.
        at: dotted path of the module that holds the parts named by `paths`.
        paths: the family's table entry.
        layers: the layers that run this FFN, counted from 0 within `stack`. There are several where layers share it.
        hidden: H.
        inner: I.
        activation: a name for ``transformers.activations.ACT2FN``.
        gate_bias, up_bias, down_bias: whether each bias exists.
    """

    index: int
    at: str
    paths: FFNPaths
    layers: tuple[int, ...]
    hidden: int
    inner: int
    activation: str
    gate_bias: bool = False
    up_bias: bool = False
    down_bias: bool = False

    @property
    def name(self) -> str:
        """Dotted path of the ONE FFN module after `isolate`."""
        return self.at if self.kind == "module" else f"{self.at}.{self.paths.up}"

    @property
    def kind(self) -> Kind:
        """ "module", "split" or "inline", see `factormix.ffn.families`."""
        return self.paths.kind

    @property
    def stack(self) -> Stack:
        """ "decoder" or "encoder"."""
        return self.paths.stack

    @property
    def gated(self) -> bool:
        """True when a gate multiplies the up projection."""
        return self.paths.gated

    @property
    def use_count(self) -> int:
        """How many times one token crosses this FFN in a forward pass."""
        return len(self.layers)

    @property
    def matrix_parameters(self) -> int:
        """Number of weights in the FFN's matrices: 3 H I when gated, else 2 H I."""
        return (3 if self.gated else 2) * self.hidden * self.inner

    @property
    def parameters(self) -> int:
        """Number of weights and biases of this FFN."""
        return self.matrix_parameters + (self.gate_bias + self.up_bias) * self.inner + self.down_bias * self.hidden

    def act(self) -> Activation:
        """A fresh activation function, (..., I) -> (..., I)."""
        return cast(Activation, ACT2FN[self.activation])


def rows(linear: nn.Module, where: str) -> Tensor:
    """The weight of a Linear or Conv1D as a detached (out, in) view, in the model's dtype.

    Raises:
        FactorMixError: the module is neither, or its weight is packed (quantised).
    """
    weight = linear.weight if isinstance(linear, (nn.Linear, Conv1D)) else None
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        held = f"{type(linear).__name__}" + ("" if weight is None else f" with a {weight.dtype} weight")
        raise FactorMixError(
            f"{where} is {held}; an FFN needs a floating-point nn.Linear or Conv1D there. "
            "Load the model unquantised, and merge any adapters into it first (PEFT: merge_and_unload())."
        )
    return weight.detach().T if isinstance(linear, Conv1D) else weight.detach()


def bias_of(linear: nn.Module) -> Tensor | None:
    """The bias (out,) of a Linear or Conv1D, detached, or None."""
    bias = getattr(linear, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


def name_activation(act: object, config: object, where: str) -> str:
    """The name under which ``ACT2FN`` holds a function equal to `act`.

    The config's own name is tried first, then the usual ones. Two functions are equal if they agree bit for bit on
    [-12, 12], because relu6 and the clipped gelu_10 differ from the others only that far out.

    Raises:
        FactorMixError: `act` has trainable parameters, or equals no named function.
    """
    trainable = isinstance(act, nn.Module) and next(act.parameters(), None) is not None
    words = [word for word in (getattr(config, field, None) for field in CONFIG_FIELDS) if isinstance(word, str)]
    if callable(act) and not trainable:
        grid = torch.linspace(-12, 12, 481, dtype=torch.float32, device="cpu")
        want = act(grid)
        for word in [*words, *NAMED_ACTIVATIONS]:
            if word not in ACT2FN:
                continue
            candidate = ACT2FN[word]
            if any(True for _ in candidate.parameters()):
                continue
            if torch.equal(candidate(grid), want):
                return word
    why = "it has trainable parameters" if trainable else "it equals no parameter-free function of ACT2FN"
    raise FactorMixError(
        f"the activation {act!r} at {where} cannot be named: {why} (config says {words or 'nothing'}). "
        f"Allowed: {', '.join(NAMED_ACTIVATIONS)}. Only FFNs whose activation has such a name can be factorised."
    )
