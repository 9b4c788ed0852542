"""Parity: the exported model, loaded by plain transformers, against the factored one, in float32 on real text.

Two runs. Forced: the exported routers are given FactorMix's choices and weigh them as they do. What is left is the
error of folded weights and uneven gates. Both models are then in the same state, so what the routers would have chosen
is held against FactorMix's choice, decision by decision. Free: they choose by themselves, as they will for a user. One
near-tie that falls the other way there changes the states after it, and with them more decisions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from factormix.data.packing import Packed
from factormix.export.container import Container
from factormix.export.needs import Needs
from factormix.export.scoring import Scoring, flipped
from factormix.run.errors import FactorMixError
from factormix.run.progress import progress

LEAST_TOKENS = 4096
LOGIT_ERROR = 1e-3
TOP1 = 0.995
PERPLEXITY = 0.002
TIE = 0.01  # in standard deviations of a layer's scores: closer experts count as tied


@dataclass(frozen=True)
class Parity:
    """How far an exported model is from the factored one.

    Attributes:
        tokens: positions compared.
        logit_error: |exported - FactorMix| / |FactorMix| over all logits, choices forced.
        free_logit_error: the same, choices free.
        flips: share of (token, layer) pairs where the exported router would choose another set of experts, in the
            state of the forced run.
        flips_beyond_ties: the share of pairs where it would though FactorMix's own scores were no tie (`TIE`).
        free_flips: share of pairs where the free choice is another set.
        top1: share of tokens with the same most likely next token, choices free.
        perplexity, exported_perplexity: FactorMix's and the exported model's, choices free.
    """

    tokens: int
    logit_error: float
    free_logit_error: float
    flips: float
    flips_beyond_ties: float
    free_flips: float
    top1: float
    perplexity: float
    exported_perplexity: float

    @property
    def perplexity_change(self) -> float:
        """exported / FactorMix - 1."""
        return self.exported_perplexity / self.perplexity - 1

    def failures(self, container: Container) -> list[str]:
        """What is outside its limit, a clause each; empty where all is well."""
        limits = [
            ("relative error of the logits, experts forced", self.logit_error, LOGIT_ERROR),
            ("share of routing decisions that differ", self.flips, container.flips),
            ("share of routing decisions that differ and were no tie", self.flips_beyond_ties, container.beyond_ties),
            ("share of tokens with another most likely next token", 1 - self.top1, 1 - TOP1),
            ("relative change of perplexity", abs(self.perplexity_change), PERPLEXITY),
        ]
        return [  # NaN is outside too
            f"{what} is {value:.2g}, at most {most:.2g} is allowed" for what, value, most in limits if not value <= most
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "perplexity_change": self.perplexity_change}


@torch.inference_mode()
def compare(
    model: PreTrainedModel, folder: Path, container: Container, needs: Needs, packed: Packed, quiet: bool = False
) -> Parity:
    """Load `folder` with plain transformers and compare it with `model` (float32) on `packed`.

    Raises:
        FactorMixError: the directory does not load whole.
    """
    exported = load_plain(folder)
    sums = _Sums()
    ours, theirs = routers_of(model), exported_routers(exported, container, needs)
    for ids, scored in zip(progress(packed.input_ids, "parity", total=len(packed), quiet=quiet), packed.scored):
        batch = ids[None]  # (1, L)
        with _watched(ours) as seen:
            own = model(input_ids=batch, use_cache=False).logits[0]  # (L, V)
        scores, chosen = [o[0] for o in seen], [o[1] for o in seen]  # layer by layer (L, R), (L, K)
        with _watched(theirs) as would, _forced(theirs, chosen, container.scoring(needs)):
            forced = exported(input_ids=batch, use_cache=False).logits[0]  # (L, V)
        with _watched(theirs) as seen:
            free = exported(input_ids=batch, use_cache=False).logits[0]  # (L, V)
        sums.add(ids, scored, own, forced, free)
        for z, one, other, at_last in zip(scores, chosen, (o[2] for o in would), (o[2] for o in seen)):
            sums.add_choices(z, one, other, at_last)
    return sums.parity()


def load_plain(folder: Path) -> PreTrainedModel:
    """The exported model as any user of transformers gets it, in float32.

    Raises:
        FactorMixError: weights are missing or left over.
    """
    auto: Any = AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    wrong = sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]))
    if wrong:
        raise FactorMixError(f"the exported model does not load whole: {', '.join(wrong[:3])} ({len(wrong)} in all).")
    return model.eval()  # type: ignore[no-any-return]


def routers_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """FactorMix's routers, layer by layer; each gives (scores, chosen)."""
    return [ffn.router for ffn in model.sparse_ffns().values()]  # type: ignore[operator]


def exported_routers(exported: PreTrainedModel, container: Container, needs: Needs) -> list[torch.nn.Module]:
    """A container's routers, layer by layer; each gives (logits, weights, chosen)."""
    layers = range(len(needs.specs))
    return [exported.get_submodule(f"model.layers.{layer}.{container.router_name}") for layer in layers]


@contextlib.contextmanager
def _watched(routers: list[torch.nn.Module]) -> Iterator[list[tuple[Tensor, ...]]]:
    """Everything the routers give in one forward, layer by layer."""
    seen: list[tuple[Tensor, ...]] = []
    hooks = [router.register_forward_hook(lambda _module, _inputs, output: seen.append(output)) for router in routers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _forced(routers: list[torch.nn.Module], chosen: list[Tensor], scoring: Scoring) -> Iterator[None]:
    """The routers choose `chosen`, layer by layer (T, K), and weigh them by their own logits."""

    def force(_module: torch.nn.Module, _inputs: Any, output: Any, choice: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return output[0], scoring.weights(output[0], choice).to(output[1].dtype), choice

    hooks = [
        router.register_forward_hook(
            lambda module, inputs, output, choice=choice: force(module, inputs, output, choice)
        )
        for router, choice in zip(routers, chosen)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Sums:
    """Sums over windows, float64."""

    def __init__(self) -> None:
        self.tokens = self.scored = self.same = self.pairs = self.flips = self.beyond = self.free_flips = 0
        self.norm = self.forced = self.free = self.nll = self.exported_nll = 0.0

    def add(self, ids: Tensor, scored: Tensor, own: Tensor, forced: Tensor, free: Tensor) -> None:
        """ids, scored (L); logits (L, V) of FactorMix and of the exported model, experts forced and free."""
        self.tokens += len(ids)
        self.norm += float(own.double().square().sum())
        self.forced += float((forced - own).double().square().sum())
        self.free += float((free - own).double().square().sum())
        self.same += int((own.argmax(-1) == free.argmax(-1)).sum())
        at = scored[1:].nonzero()[:, 0]  # positions that predict a scored token
        self.scored += len(at)
        for name, logits in (("nll", own), ("exported_nll", free)):
            nll = torch.nn.functional.cross_entropy(logits[at].float(), ids[at + 1], reduction="sum")
            setattr(self, name, getattr(self, name) + float(nll))

    def add_choices(self, scores: Tensor, own: Tensor, other: Tensor, free: Tensor) -> None:
        """One layer: FactorMix's scores (L, R) and choice (L, K), and the exported model's two choices (L, K')."""
        active, flips = own.shape[-1], _differ(own, other)  # (L)
        self.pairs += len(own)
        self.flips += int(flips.sum())
        self.free_flips += int(_differ(own, free).sum())
        if active < scores.shape[-1]:
            ordered = scores.sort(-1, descending=True).values  # (L, R)
            spread = (scores - scores.mean(-1, keepdim=True)).square().mean().sqrt()
            gap = (ordered[:, active - 1] - ordered[:, active]) / spread  # (L)
            self.beyond += int((flips & (gap > TIE)).sum())

    def parity(self) -> Parity:
        return Parity(
            tokens=self.tokens,
            logit_error=(self.forced / self.norm) ** 0.5,
            free_logit_error=(self.free / self.norm) ** 0.5,
            flips=self.flips / self.pairs,
            flips_beyond_ties=self.beyond / self.pairs,
            free_flips=self.free_flips / self.pairs,
            top1=self.same / self.tokens,
            perplexity=_exp(self.nll / max(1, self.scored)),
            exported_perplexity=_exp(self.exported_nll / max(1, self.scored)),
        )


def _differ(own: Tensor, other: Tensor) -> Tensor:
    """Where two choices are different sets, (L, K) and (L, K') -> (L) bool; an approximation may choose more."""
    if own.shape != other.shape:
        return torch.ones(len(own), dtype=torch.bool)
    return flipped(own.sort(-1).values, other.sort(-1).values)


def _exp(nats: float) -> float:
    return float(torch.tensor(min(nats, 700.0), dtype=torch.float64).exp())
