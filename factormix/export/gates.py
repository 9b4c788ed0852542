"""The routers of a hard gate as a container's: mean row off, unit spread, times 2**-m.

Adding one row to all of a router's adds one number to all logits of a token, which no softmax sees: the mean row goes.
The rest is scaled by a power of two (exact) so that its logits have about unit spread on text, and by 2**-m. A larger
m makes the weights of the chosen more even and the scores coarser: in float32, experts whose logits differ by less than
about 2**(m - 23) tie, and chance chooses. `choose_m` takes the m in `M` that costs least, both measured.

Both errors are seeds: one token whose experts differ in one layer differs more in the layers after it, and a little in
all later tokens. A container that chooses before it scores (Granite, in transformers and in vLLM on CPUs) has no ties
and takes the largest m. `M` ends at 14 all the same, because other engines may score Granite's experts first; llama.cpp
does, so a .gguf file's m is chosen by llama.cpp's scoring (docs/engines.md has what m does either way).
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
FLIPS, DEVIATION = 1e-3, 1e-3  # what parity allows: decisions that flip; relative error of the output


@dataclass(frozen=True)
class Gates:
    """How the routers are to be written.

    Attributes:
        m: of 2**-m, None where the routers stay as they are (a gate that needs its scores).
        exponents: layer by layer, e of the power of two 2**e that gives unit spread.
        flips: by m, the share of (token, layer) decisions that scoring in float32 changes.
        deviations: by m, the mean relative distance of the chosen experts' weights from uniform ones.
        means: layer by layer, the mean of the gate's multiplier (1 unless it differs by token).
    """

    m: int | None
    exponents: tuple[int, ...]
    flips: dict[int, float]
    deviations: dict[int, float]
    means: tuple[float, ...]

    def rows(self, weight: Tensor, layer: int) -> Tensor:
        """A router (R, H) as it is to be written, float32."""
        if self.m is None:
            return weight.float()
        exact = weight.double()
        return torch.ldexp(exact - exact.mean(0), torch.tensor(self.exponents[layer] - self.m)).float()  # (R, H)


def measure_gates(model: PreTrainedModel, packed: Packed, scoring: Scoring, quiet: bool = False) -> Gates:
    """Run `model` over `packed` and choose the exponents and m.

    Args:
        model: the factored model.
        packed: windows of real text.
        scoring: the container's; where it needs the scores themselves, the routers stay as they are.
        quiet: no progress line.
    """
    ffns = list(model.sparse_ffns().values())  # type: ignore[operator]
    scores = router_scores(model, packed, quiet)  # layer by layer (T, R)
    means = tuple(
        float(z.topk(ffn.spec.active, dim=-1).values.sigmoid().mean()) if ffn.spec.output_weight == "soft" else 1.0
        for z, ffn in zip(scores, ffns)
    )
    if scoring.raw:
        return Gates(None, (0,) * len(ffns), {}, {}, means)
    centred = [z.double() - z.double().mean(-1, keepdim=True) for z in scores]
    exponents = tuple(_exponent(z) for z in centred)
    flips, deviations = {}, {}
    for m in M:
        measured = [
            _cost(torch.ldexp(z, torch.tensor(e - m)), ffn.spec.active, scoring)
            for z, e, ffn in zip(centred, exponents, ffns)
        ]
        flips[m] = sum(each[0] for each in measured) / len(measured)
        deviations[m] = sum(each[1] for each in measured) / len(measured)
    return Gates(choose_m(flips, deviations), exponents, flips, deviations, means)


def choose_m(flips: dict[int, float], deviations: dict[int, float]) -> int:
    """The m whose flips and deviation, each in units of what parity allows, are least together."""
    return min(flips, key=lambda m: (flips[m] / FLIPS + deviations[m] / DEVIATION, -m))


@torch.inference_mode()
def router_scores(model: PreTrainedModel, packed: Packed, quiet: bool = False) -> list[Tensor]:
    """Every router's scores on every token of `packed`, layer by layer (T, R) float32."""
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
    """e, so that 2**e times these logits (T, R) has a standard deviation between 0.7 and 1.4."""
    spread = float(centred.square().mean().sqrt())
    return 0 if spread == 0 else -round(math.log2(spread))


def _cost(logits: Tensor, active: int, scoring: Scoring) -> tuple[float, float]:
    """Flips and mean deviation of one layer: exact logits (T, R) float64, rounded to float32 as an engine does."""
    rounded = logits.float()
    chosen = top(logits, active)  # (T, K)
    flips = flipped(chosen, top(scoring.scores(rounded), active)).double().mean()
    weights = scoring.weights(rounded, chosen) * scoring.gain(active, logits.shape[-1])  # (T, K), 1 where uniform
    return float(flips), float((weights.double() - 1).abs().mean())
