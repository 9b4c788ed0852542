"""Scale the routers of a hard gate so that a container gives all chosen experts nearly the same weight.

The mean row is subtracted. This is allowed because it changes all logits of a token by one number, which a softmax does
not see. The rest is scaled by a power of two, which is exact, to about unit spread of the logits on text, and then by
2**-m. A larger m makes the weights more even, but the scores coarser: in float32, experts tie if their logits differ by
less than about 2**(m - 23). `choose_m` measures both errors and takes the m in `M` whose sum of errors is least.

Both errors grow: a token whose experts differ in one layer differs more in later layers, and slightly in all later
tokens. A container that chooses before it scores (Granite, in transformers and in vLLM on CPUs) has no ties and takes
the largest m. `M` still ends at 14, because other engines may score Granite's experts first. llama.cpp does so, and
therefore a .gguf file's m is chosen with llama.cpp's scoring. docs/engines.md shows the effect of m in both cases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from factormix.data.packing import Packed
from factormix.export.scoring import Scoring, flipped, top
from factormix.nn import FactorMixMixin
from factormix.run.progress import progress

M = (10, 11, 12, 13, 14)
FLIPS, DEVIATION = 1e-3, 1e-3  # parity's limits: share of decisions that flip, relative error of the output


@dataclass(frozen=True)
class RouterScale:
    """How the routers are scaled.

    Attributes:
        m: the scale is 2**-m. None leaves the routers unchanged, for a gate that uses the scores themselves.
        exponents: for each layer, the e of the power of two 2**e that gives unit spread.
        flips: for each m, the share of (token, layer) decisions that scoring in float32 changes, 0 to 1.
        deviations: for each m, the mean relative distance of the chosen experts' weights from equal weights.
        means: for each layer, the mean weight of a chosen expert in FactorMix. It is 1 unless it differs by token.
    """

    m: int | None
    exponents: tuple[int, ...]
    flips: dict[int, float]
    deviations: dict[int, float]
    means: tuple[float, ...]

    def rows(self, weight: Tensor, layer: int) -> Tensor:
        """The router of a layer as it is written: weight (R, H) -> (R, H) float32."""
        if self.m is None:
            return weight.float()
        exact = weight.double()
        return torch.ldexp(exact - exact.mean(0), torch.tensor(self.exponents[layer] - self.m)).float()  # (R, H)


def measure_router_scale(model: PreTrainedModel, packed: Packed, scoring: Scoring, quiet: bool = False) -> RouterScale:
    """Run `model` over `packed`, and choose the exponents and m.

    Args:
        model: the factored model.
        packed: windows of real text.
        scoring: the container's scoring. If its weights are the scores themselves, the routers stay unchanged.
        quiet: show no progress line.
    """
    ffns = list(model.sparse_ffns().values())  # type: ignore[operator]
    scores = router_scores(model, packed, quiet)  # layer by layer (T, R)
    means = tuple(
        float(z.topk(ffn.spec.active, dim=-1).values.sigmoid().mean()) if ffn.spec.output_weight == "soft" else 1.0
        for z, ffn in zip(scores, ffns)
    )
    if scoring.raw:
        return RouterScale(None, (0,) * len(ffns), {}, {}, means)
    centred = [z.double() - z.double().mean(-1, keepdim=True) for z in scores]
    exponents = tuple(_exponent(z) for z in centred)
    flips, deviations = {}, {}
    for m in M:
        measured = [
            _cost(torch.ldexp(z, torch.tensor(e - m)), ffn.spec.active, scoring)
            for z, e, ffn in zip(centred, exponents, ffns)
        ]
        flips[m] = sum(layer_flips for layer_flips, _ in measured) / len(measured)
        deviations[m] = sum(deviation for _, deviation in measured) / len(measured)
    return RouterScale(choose_m(flips, deviations), exponents, flips, deviations, means)


def choose_m(flips: dict[int, float], deviations: dict[int, float]) -> int:
    """The m with the least sum of flips and deviation, each divided by its limit in parity."""
    return min(flips, key=lambda m: (flips[m] / FLIPS + deviations[m] / DEVIATION, -m))


@torch.inference_mode()
def router_scores(model: PreTrainedModel, packed: Packed, quiet: bool = False) -> list[Tensor]:
    """Every router's scores on every token of `packed`: for each layer (T, R) float32."""
    assert isinstance(model, FactorMixMixin)
    ffns = list(model.sparse_ffns().values())
    seen: list[list[Tensor]] = [[] for _ in ffns]
    hooks = [
        ffn.router.register_forward_hook(lambda _module, _inputs, output, kept=kept: kept.append(output[0].cpu()))
        for ffn, kept in zip(ffns, seen)
        if ffn.router is not None
    ]
    try:
        for ids in progress(packed.input_ids, "router scores", quiet=quiet):
            model.base_model(input_ids=ids[None].to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(kept) for kept in seen]


def _exponent(centred: Tensor) -> int:
    """The e for which 2**e times these logits (T, R) has a standard deviation between 0.7 and 1.4."""
    spread = float(centred.square().mean().sqrt())
    return 0 if spread == 0 else -round(math.log2(spread))


def _cost(logits: Tensor, active: int, scoring: Scoring) -> tuple[float, float]:
    """Flips and mean deviation of one layer. The exact logits (T, R) float64 are rounded to float32, as engines do."""
    rounded = logits.float()
    chosen = top(logits, active)  # (T, K)
    flips = flipped(chosen, top(scoring.scores(rounded), active)).double().mean()
    weights = scoring.weights(rounded, chosen) * scoring.gain(active, logits.shape[-1])  # (T, K), 1 if equal
    return float(flips), float((weights.double() - 1).abs().mean())
