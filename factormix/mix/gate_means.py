"""Compute the gates' mean weights of each domain, and of the FFN, over tokens that are not padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from factormix.mix.mix_model import MixModel


class GateMeans:
    """Sums up gate weights inside a ``with`` block::

        with GateMeans(mix) as means:
            mix(input_ids, attention_mask)
        means.to_dict()

    Args:
        mix: the model. Without gates the result is empty.
    """

    def __init__(self, mix: MixModel) -> None:
        self.mix = mix
        self.sums = {
            index: torch.zeros(len(gate.domains) + 1, dtype=torch.float64) for index, gate in mix.gates.items()
        }
        self.tokens = dict.fromkeys(mix.gates, 0)
        self._handles: list[Any] = []

    def __enter__(self) -> GateMeans:
        for index, gate in self.mix.gates.items():
            self._handles.append(gate.register_forward_hook(self._note(index)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _note(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: tuple[Tensor | None, Tensor]) -> None:
            ffn_weight, domain_weights = output  # (N, L) or None, (N, L, n); some families flatten N and L
            kept = self.mix.mask.bool().flatten()  # (T,)
            domains = domain_weights.detach().reshape(-1, domain_weights.shape[-1])[kept]  # (T', n)
            ffn = torch.ones(len(domains)) if ffn_weight is None else ffn_weight.detach().flatten()[kept]  # (T',)
            weights = torch.cat([ffn.to(domains)[:, None], domains], dim=1)  # (T', 1 + n)
            self.sums[index] += weights.double().sum(0).cpu()
            self.tokens[index] += len(domains)

        return hook

    def to_dict(self) -> dict[str, Any]:
        """{"mean": {"ffn": 1.0, "<domain>": 0.9}, "sites": {"8": {...}}}. An FFN that layers share counts each use."""
        sites: dict[str, dict[str, float]] = {}
        for index, gate in self.mix.gates.items():
            if self.tokens[index]:
                means = (self.sums[index] / self.tokens[index]).tolist()
                sites[str(index)] = dict(zip(("ffn", *gate.domains), means))
        names = ("ffn", *self.mix.domains) if sites else ()
        mean = {name: _mean([site[name] for site in sites.values() if name in site]) for name in names}
        return {"mean": mean, "sites": sites}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
