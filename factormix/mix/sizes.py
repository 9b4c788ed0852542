"""Which FFNs of a model get an adapter, and how wide it is: arithmetic on the model's sites, no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from factormix.ffn import FFNSite
from factormix.nn import DomainAdapterSpec
from factormix.run.errors import FactorMixError

ALIGN = (256, 32)  # I + r is kept a multiple of the first of these that leaves most of the width, for merging
KEEP = 0.75  # part of the width that rounding down to the larger multiple must leave


@dataclass(frozen=True)
class Sizes:
    """Adapters of one domain.

    Attributes:
        sites: the FFNs that get one, front to back.
        width: r, the same at all of them.
        specs: the shapes by site index.
        model_parameters: of the model without adapters.
    """

    sites: tuple[FFNSite, ...]
    width: int
    specs: dict[int, DomainAdapterSpec]
    model_parameters: int

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers that run one of the sites."""
        return tuple(sorted({layer for site in self.sites for layer in site.layers}))

    @property
    def parameters(self) -> int:
        """Of all adapters together."""
        return sum(spec.parameters for spec in self.specs.values())

    @property
    def flops(self) -> int:
        """Floating-point operations that the adapters add for a token."""
        return sum(2 * self.specs[site.index].parameters * site.use_count for site in self.sites)

    def __str__(self) -> str:
        share = 100 * self.parameters / self.model_parameters
        layers = ", ".join(map(str, self.layers))
        return (
            f"{len(self.sites)} adapters of width {self.width} at layers {layers}: {self.parameters:,} parameters "
            f"({share:.2f} % of {self.model_parameters:,}), {self.flops:,} FLOPs a token"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "layers": list(self.layers),
            "width": self.width,
            "parameters": self.parameters,
            "share": self.parameters / self.model_parameters,
            "flops_per_token": self.flops,
        }


def choose_sites(sites: Sequence[FFNSite], layers: str | Sequence[int]) -> tuple[FFNSite, ...]:
    """The sites that run the chosen layers (of both stacks, in an encoder-decoder).

    Args:
        sites: all of the model's.
        layers: "auto" (the paper's 7 and 11 of 24), "spread" (every third from L/5 on), "7,11" or [7, 11]. Of layers
            that share one FFN, any of them names it.

    Raises:
        FactorMixError: not understood, or a layer that does not exist.
    """
    total = 1 + max(layer for site in sites for layer in site.layers)
    if layers == "auto":
        wanted = {7 * total // 24, 11 * total // 24}
    elif layers == "spread":
        wanted = set(range(total // 5, total, 3))
    else:
        try:
            wanted = {int(word) for word in (layers.split(",") if isinstance(layers, str) else layers)}
        except ValueError:
            raise FactorMixError(
                f"layers {layers!r} is not understood; write auto, spread, or numbers such as 7,11."
            ) from None
    unknown = sorted(wanted - set(range(total)))
    if unknown or not wanted:
        raise FactorMixError(f"layers {layers!r}: {unknown or 'none'} not allowed; this model has 0 to {total - 1}.")
    return tuple(site for site in sites if wanted & set(site.layers))


def adapter_sizes(
    sites: Sequence[FFNSite],
    model_parameters: int,
    *,
    form: str,
    reads: str,
    layers: str | Sequence[int],
    width: int | None,
    reduction: float | None,
    budget: float,
) -> Sizes:
    """The adapters of one domain for a model; width decides, else reduction, else budget (see `InjectConfig`).

    A width that comes from a budget is rounded down so that I + r, the merged FFN's width, suits engines: a multiple
    of 256 if that leaves three quarters of it, else of 32.

    Raises:
        FactorMixError: as `choose_sites`; a budget too small for one neuron, with the arithmetic.
    """
    chosen = choose_sites(sites, layers)

    def spec(site: FFNSite, r: int) -> DomainAdapterSpec:
        biased = site.up_bias or site.gate_bias
        return DomainAdapterSpec.of_form(
            form, reads, r, site.hidden, site.inner, site.activation, site.gated, biased
        )  # fmt: skip

    if width is None and reduction is not None:
        width = max(1, int(chosen[0].hidden / reduction))
    if width is None:
        one, two = (sum(spec(site, r).parameters for site in chosen) for r in (1, 2))
        fits = int((budget * model_parameters - (2 * one - two)) // (two - one))  # two - one: of a neuron
        if fits < 1:
            raise FactorMixError(
                f"budget {budget} of {model_parameters:,} parameters is {int(budget * model_parameters):,}; one neuron "
                f"in each of {len(chosen)} adapters takes {one:,}. Raise --budget, or choose fewer layers."
            )
        width = _aligned(fits, chosen[0].inner) if form == "ffn" else fits
    return Sizes(chosen, width, {site.index: spec(site, width) for site in chosen}, model_parameters)


def _aligned(width: int, inner: int) -> int:
    """The largest r <= width with I + r a multiple of 256 or 32; `width` where there is none."""
    for multiple in ALIGN:
        rounded = (inner + width) // multiple * multiple - inner
        if rounded >= (KEEP * width if multiple == ALIGN[0] else 1):
            return rounded
    return width
