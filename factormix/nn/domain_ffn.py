"""DomainFFN: one FFN, dense or sparse, with domain adapters beside it and perhaps a gate over them.

    y = g_0(x) F(x) + sum over active domains d of  g_d(x) A_d(x)            (MixDA, section 3)

Without a gate g_0 is 1 and g_d is the domain's fixed weight. With no active domain the FFN runs alone and y is F(x),
bit for bit. Swapped in with ``ffn.swap``, it serves every family of the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from factormix.ffn import FFNSite
from factormix.nn.domain_adapter import DomainAdapter, DomainAdapterSpec
from factormix.nn.domain_gate import DomainGate
from factormix.nn.rms import rms
from factormix.nn.sparse_ffn import SparseFFN
from factormix.run.errors import FactorMixError, choose


class DomainFFN(nn.Module):
    """(..., H) -> (..., H); see the module's equation.

    Attributes:
        base_layer: the frozen FFN. This name and the next are those that PEFT tells an adapter's tensors by.
        mixda_adapters: the adapters by domain.
        gate: over the domains it names, or None.
        fixed_weights: weight of each domain that no gate weighs.
        active_domains: which adapters run, in order.
        use_count: how many times a token crosses the FFN in a forward pass (ALBERT's: several).
        hidden: H.
    """

    def __init__(self, base: nn.Module, site: FFNSite) -> None:
        super().__init__()
        self.base_layer = base
        self.mixda_adapters = nn.ModuleDict()
        self.gate: DomainGate | None = None
        self.fixed_weights: dict[str, float] = {}
        self._active: list[str] = []
        self.use_count, self.hidden = site.use_count, site.hidden
        self._up, self._down = ("", "") if isinstance(base, SparseFFN) else _paths(site)

    @property
    def active_domains(self) -> list[str]:
        """The adapters that run."""
        return self._active

    def add(self, domain: str, adapter: DomainAdapter, weight: float = 1.0) -> None:
        """Put an adapter beside the FFN, on its device and active.

        Raises:
            FactorMixError: the domain is there already.
        """
        if domain in self.mixda_adapters:
            raise FactorMixError(f"domain {domain!r} has an adapter here already; choose another name.")
        like = next(self.base_layer.parameters())
        if adapter.in_proj.device.type != "meta":  # PEFT makes empty adapters there and fills them afterwards
            adapter = adapter.to(like.device)
        self.mixda_adapters[domain] = adapter
        self.fixed_weights[domain] = weight
        self._active = [*self._active, domain]

    @torch.no_grad()
    def fresh(self, spec: DomainAdapterSpec) -> DomainAdapter:
        """A new adapter for this FFN, not yet beside it. One that reads the FFN's input gets rows as large as the up
        projection's, so that its neurons start as active as the FFN's own."""
        adapter = DomainAdapter(spec)
        up = self._weights()[0][0]
        if spec.reads == "input" and up.device.type != "meta" and adapter.in_proj.device.type != "meta":
            adapter.reset(rms(up))
        return adapter

    @torch.no_grad()
    def row_norm(self) -> float:
        """|W_down|_F / sqrt(H), of all neurons: how much a random sum of the FFN's neurons, each 1 or -1, moves one
        number of its output."""
        return (sum(float(down.float().square().sum()) for _, down in self._weights()) / self.hidden) ** 0.5

    def _weights(self) -> list[tuple[Tensor, Tensor]]:
        """Up and down projection of the FFN; of a sparse one, those of its shared neurons, then of its experts."""
        ffn = self.base_layer
        if not isinstance(ffn, SparseFFN):
            up, down = (cast(Tensor, ffn.get_submodule(path).weight) for path in (self._up, self._down))
            return [(up, down)]
        parts = [part.packed() for part in (ffn.shared, ffn.experts) if part is not None]
        return [(cast(Tensor, part.up), cast(Tensor, part.down)) for part in parts]

    def activate(self, domains: list[str]) -> None:
        """Run these adapters and no others.

        Raises:
            FactorMixError: a domain without an adapter here.
        """
        for domain in domains:
            choose("domain", domain, self.mixda_adapters)
        self._active = list(domains)

    def set_gate(self, gate: DomainGate | None) -> None:
        """Let a gate weigh the domains it names, or fixed weights again (None).

        Raises:
            FactorMixError: the gate names a domain without an adapter here.
        """
        for domain in () if gate is None else gate.domains:
            choose("domain of the gate", domain, self.mixda_adapters)
        self.gate = gate

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (..., H) -> (..., H)."""
        active = self.active_domains
        if not active:
            return cast(Tensor, self.base_layer(hidden_states))
        adapters = [cast(DomainAdapter, self.mixda_adapters[domain]) for domain in active]
        y, neurons = self._base(hidden_states, any(a.spec.reads == "neurons" for a in adapters))  # (..., H), (..., I)
        shares: Tensor | None = None
        if self.gate is not None:
            of_ffn, shares = self.gate(hidden_states)  # (...) or None, (..., n)
            if of_ffn is not None:
                y = y * of_ffn.unsqueeze(-1).to(y.dtype)
        for domain, adapter in zip(active, adapters):
            added = adapter(hidden_states if adapter.spec.reads == "input" else neurons)  # (..., H)
            if shares is not None and self.gate is not None and domain in self.gate.domains:
                share = shares[..., self.gate.domains.index(domain)]  # (...)
                added = added * share.unsqueeze(-1).to(added.dtype)
            elif self.fixed_weights[domain] != 1.0:
                added = added * self.fixed_weights[domain]
            y = y + added.to(y.dtype)
        return y

    def _base(self, x: Tensor, with_neurons: bool) -> tuple[Tensor, Tensor | None]:
        """F(x) (..., H), and the neurons (..., I) where an adapter reads them: of a sparse FFN the chosen experts'
        only, in packed order."""
        if not with_neurons:
            return self.base_layer(x), None
        if isinstance(self.base_layer, SparseFFN):
            return self.base_layer(x), self.base_layer.active_neurons(x)
        seen: list[Tensor] = []
        with _reading_input(self.base_layer.get_submodule(self._down), seen):
            y = self.base_layer(x)
        return y, seen[0]


def _paths(site: FFNSite) -> tuple[str, str]:
    """Where the up and the down projection are below the dense FFN's one module; `isolate` names them so."""
    return (site.paths.up, site.paths.down) if site.kind == "module" else ("up", "down")


@contextmanager
def _reading_input(module: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    """Note what `module` is given: the FFN's own forward computes the neurons, once, whatever the family."""
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield
    finally:
        handle.remove()
