"""Choose which FFNs of a model get an adapter, and how wide it is. This needs the model's sites but no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from factormix.ffn import FFNSite
from factormix.nn import DomainAdapterSpec
from factormix.run.errors import FactorMixError

ALIGN = (256, 32)  # I + r is rounded down to a multiple of 256 if that keeps most of r, else of 32
KEEP = 0.75  # share of r that rounding to the larger multiple must keep


@dataclass(frozen=True)
class Sizes:
    """The adapters of one domain.

    Attributes:
        sites: the FFNs that get an adapter, from front to back.
        width: r, the neurons of each adapter.
        specs: shapes of the adapters by site index.
        model_parameters: parameters of the model without adapters.
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
        """Parameters of all adapters together."""
        return sum(spec.parameters for spec in self.specs.values())

    @property
    def flops(self) -> int:
        """Floating-point operations that the adapters add for one token."""
        return sum(2 * self.specs[site.index].parameters * site.use_count for site in self.sites)

    def __str__(self) -> str:
        share = 100 * self.parameters / self.model_parameters
        layers = ", ".join(map(str, self.layers))
        return (
            f"{len(self.sites)} adapters of width {self.width} at layers {layers}: {self.parameters:,} parameters "
            f"({share:.2f} % of {self.model_parameters:,}), {self.flops:,} FLOPs per token"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "layers": list(self.layers),
            "width": self.width,
            "parameters": self.parameters,
            "share": self.parameters / self.model_parameters,
            "flops_per_token": self.flops,
        }


def choose_sites(sites: Sequence[FFNSite], layers: str | Sequence[int]) -> tuple[FFNSite, ...]:
    """The sites that run the chosen layers. In an encoder-decoder these are sites of both stacks.

    Args:
        sites: all sites of the model.
        layers: "auto" (the paper's 7 and 11 of 24), "spread" (every third from L/5 on), "7,11" or [7, 11]. If layers
            share one FFN, any of them selects it.

    Raises:
        FactorMixError: `layers` is not understood, or a layer does not exist.
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
                f"layers {layers!r} is not understood; allowed: auto, spread, or numbers such as 7,11."
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
    """Compute the adapters of one domain for a model.

    The width is `width` if given, else H / `reduction` if that is given, else as large as `budget` allows. A width from
    a budget is rounded down so that engines run the merged FFN's width I + r well: to a multiple of 256 if that keeps
    three quarters of r, else to a multiple of 32.

    Args:
        sites: all sites of the model.
        model_parameters: parameters of the model without adapters.
        form, reads, layers, width, reduction, budget: see `InjectConfig`.

    Raises:
        FactorMixError: `choose_sites` refuses, or the budget is too small for one neuron; the message shows the sum.
    """
    chosen = choose_sites(sites, layers)

    def spec(site: FFNSite, r: int) -> DomainAdapterSpec:
        biased = site.up_bias or site.gate_bias
        return DomainAdapterSpec.of_form(form, reads, r, site.hidden, site.inner, site.activation, site.gated, biased)

    if width is None and reduction is not None:
        width = max(1, int(chosen[0].hidden / reduction))
    if width is None:
        one, two = (sum(spec(site, r).parameters for site in chosen) for r in (1, 2))
        fits = int((budget * model_parameters - (2 * one - two)) // (two - one))  # two - one: parameters of a neuron
        if fits < 1:
            raise FactorMixError(
                f"budget {budget} of {model_parameters:,} parameters is {int(budget * model_parameters):,}, but one "
                f"neuron in each of {len(chosen)} adapters takes {one:,}. Raise --budget, or choose fewer layers."
            )
        width = _aligned(fits, chosen[0].inner) if form == "ffn" else fits
    return Sizes(chosen, width, {site.index: spec(site, width) for site in chosen}, model_parameters)


def _aligned(width: int, inner: int) -> int:
    """The largest r <= width for which I + r is a multiple of 256 or 32; `width` if there is none."""
    for multiple in ALIGN:
        rounded = (inner + width) // multiple * multiple - inner
        if rounded >= (KEEP * width if multiple == ALIGN[0] else 1):
            return rounded
    return width
