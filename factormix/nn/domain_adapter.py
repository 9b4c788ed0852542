"""DomainAdapter: a small network in parallel with a frozen FFN (MixDA, section 3.1); its output is added to the FFN's.

    A(x) = act(W_in u + b_in) W_out + b_out                  plain;  u is the FFN's input x or its neurons
    A(x) = (act(W_gate x) * (W_up x)) W_out                  gated

``bottleneck`` is the paper's form: GELU, both biases, reads the FFN's post-activation neurons (or its input).
``ffn`` is a small FFN of the backbone's own kind (gated as it is, same activation, biases inside where it has them), so
its r neurons can later be appended to the FFN. W_out and b_out start at zero: a fresh adapter changes nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from factormix.experts.packed import activation
from factormix.run.errors import FactorMixError, choose

Form = Literal["ffn", "bottleneck"]
Reads = Literal["input", "neurons"]


@dataclass(frozen=True)
class DomainAdapterSpec:
    """All that decides a DomainAdapter's shapes.

    Attributes:
        hidden: H.
        width: r, neurons of the adapter.
        source: size of what it reads: H for the FFN's input, I for the FFN's neurons.
        activation: a key of ``ACT2FN``.
        gated: act(gate) * up, or act(up).
        in_bias, out_bias: whether the two projections have biases.
        reads: "input" or "neurons".

    Raises:
        FactorMixError: a width below 1, or an unknown `reads`.
    """

    hidden: int
    width: int
    source: int
    activation: str
    gated: bool
    in_bias: bool
    out_bias: bool
    reads: Reads = "input"

    def __post_init__(self) -> None:
        choose("reads", self.reads, get_args(Reads))
        if self.width < 1:
            raise FactorMixError(f"adapter width received {self.width}; allowed: at least 1. Give a larger budget.")

    @classmethod
    def of_form(
        cls, form: str, reads: str, width: int, hidden: int, inner: int, act: str, gated: bool, up_bias: bool
    ) -> DomainAdapterSpec:
        """The spec of either form beside an FFN (H `hidden`, I `inner`, activation `act`, `gated`, `up_bias`).

        Raises:
            FactorMixError: an unknown form; the `ffn` form asked to read neurons.
        """
        choose("adapter form", form, get_args(Form))
        choose("reads", reads, get_args(Reads))
        if form == "bottleneck":
            source = inner if reads == "neurons" else hidden
            return cls(hidden, width, source, "gelu", False, True, True, reads)  # type: ignore[arg-type]
        if reads == "neurons":
            raise FactorMixError(
                "reads 'neurons' goes with form 'bottleneck': an adapter of form 'ffn' is a small FFN and reads the "
                "FFN's input. Use reads 'input', or form 'bottleneck'."
            )
        return cls(hidden, width, hidden, act, gated, up_bias, False)

    @property
    def parameters(self) -> int:
        """Weights and biases of one adapter."""
        rows = (2 if self.gated else 1) * self.width
        return rows * (self.source + self.in_bias) + self.hidden * (self.width + self.out_bias)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


class DomainAdapter(nn.Module):
    """One domain's adapter beside one FFN: (..., source) -> (..., H).

    The tensors are parameters of the module itself, not of Linears inside it: PEFT finds the adapter's name in the
    last but one place of a tensor's name, and there only.

    Attributes:
        spec: the shapes.
        in_proj: (r, source), or (2r, source) when gated, gate rows first.
        in_bias: (r) or (2r), or None.
        out_proj: (H, r).
        out_bias: (H), or None.
    """

    def __init__(self, spec: DomainAdapterSpec) -> None:
        super().__init__()
        self.spec = spec
        rows = (2 if spec.gated else 1) * spec.width
        self.in_proj = nn.Parameter(torch.empty(rows, spec.source))
        self.in_bias = nn.Parameter(torch.empty(rows)) if spec.in_bias else None
        self.out_proj = nn.Parameter(torch.empty(spec.hidden, spec.width))
        self.out_bias = nn.Parameter(torch.empty(spec.hidden)) if spec.out_bias else None
        self.reset()

    @torch.no_grad()
    def reset(self, std: float | None = None) -> None:
        """A fresh adapter: in_proj normal, everything else zero.

        Args:
            std: of in_proj's entries; by default source ** -0.5, rows of unit expected norm. An adapter that reads an
                FFN's input should have the FFN's own: that input is small where the FFN's rows are large.
        """
        nn.init.normal_(self.in_proj, std=self.spec.source**-0.5 if std is None else std)
        for parameter in (self.in_bias, self.out_proj, self.out_bias):
            if parameter is not None:
                parameter.zero_()

    def forward(self, source: Tensor) -> Tensor:
        """source (..., H or I) -> (..., H), in source's dtype (outside autocast the adapter computes in its own)."""
        x = source.to(self.in_proj.dtype)
        h = nn.functional.linear(x, self.in_proj, self.in_bias)  # (..., r or 2r)
        act = activation(self.spec.activation)
        if self.spec.gated:
            gate, up = h.chunk(2, dim=-1)  # (..., r) each
            h = act(gate) * up  # (..., r)
        else:
            h = act(h)
        return nn.functional.linear(h, self.out_proj, self.out_bias).to(source.dtype)  # (..., H)

    def extra_repr(self) -> str:
        spec = self.spec
        return f"{spec.reads} {spec.source} -> {spec.width} -> {spec.hidden}, {spec.activation}, gated={spec.gated}"
