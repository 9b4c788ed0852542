"""Measure parity: the exported model, loaded by plain transformers, against the factored one, in float32 on real text.

There are two runs. In the forced run, the exported routers must take FactorMix's choices, and weigh them in their own
way. What remains is the error of folded weights and uneven weights of experts. Both models are then in the same state,
so the exported routers' own choices can be compared with FactorMix's, decision by decision. In the free run, the
exported routers choose by themselves, as they will for a user. One near-tie that is decided differently changes the
states after it, and so further decisions.
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

LEAST_TOKENS = 4096  # the fewest tokens of text to compare on
LOGIT_ERROR = 1e-3  # largest allowed relative error of the logits, choices forced
TOP1 = 0.995  # least allowed share of tokens with the same most likely next token
PERPLEXITY = 0.002  # largest allowed relative change of perplexity
TIE = 0.01  # experts whose scores are closer count as tied; in standard deviations of a layer's scores


@dataclass(frozen=True)
class Parity:
    """How far an exported model is from the factored one.

    Attributes:
        tokens: number of positions compared.
        logit_error: |exported - FactorMix| / |FactorMix| over all logits, with choices forced.
        free_logit_error: the same with free choices.
        flips: share of (token, layer) pairs, 0 to 1, for which the exported router would choose another set of experts
            in the state of the forced run.
        flips_beyond_ties: share of pairs that flip although FactorMix's scores were no tie (`TIE`).
        free_flips: share of pairs for which the free choice is another set.
        top1: share of tokens with the same most likely next token, with free choices.
        perplexity: perplexity of the factored model.
        exported_perplexity: perplexity of the exported model, with free choices.
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
        """One clause for each number outside its limit; empty if all are within."""
        limits = [
            ("relative error of the logits, experts forced", self.logit_error, LOGIT_ERROR),
            ("share of routing decisions that differ", self.flips, container.flips),
            ("share of routing decisions that differ and were no tie", self.flips_beyond_ties, container.beyond_ties),
            ("share of tokens with another most likely next token", 1 - self.top1, 1 - TOP1),
            ("relative change of perplexity", abs(self.perplexity_change), PERPLEXITY),
        ]
        return [  # the comparison is written so that NaN counts as outside
            f"{what} is {value:.2g}, at most {most:.2g} is allowed" for what, value, most in limits if not value <= most
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "perplexity_change": self.perplexity_change}


@torch.inference_mode()
def compare(
    model: PreTrainedModel, folder: Path, container: Container, needs: Needs, packed: Packed, quiet: bool = False
) -> Parity:
    """Load `folder` with plain transformers and compare it with `model` on text.

    Args:
        model: the factored model, in float32.
        folder: the exported directory.
        container, needs: the container, and the needs it was written with.
        packed: windows of real text.
        quiet: show no progress line.

    Raises:
        FactorMixError: weights of the directory are missing or left over.
    """
    exported = load_plain(folder)
    sums = _Sums()
    ours, theirs = routers_of(model), exported_routers(exported, container, needs)
    for ids, scored in zip(progress(packed.input_ids, "parity", total=len(packed), quiet=quiet), packed.scored):
        batch = ids[None]  # (1, L)
        with _watched(ours) as seen:
            own = model(input_ids=batch, use_cache=False).logits[0]  # (L, V)
        scores, chosen = [o[0] for o in seen], [o[1] for o in seen]  # layer by layer (L, R), (L, K)
        with _watched(theirs) as forced_run, _forced(theirs, chosen, container.scoring(needs)):
            forced = exported(input_ids=batch, use_cache=False).logits[0]  # (L, V)
        with _watched(theirs) as free_run:
            free = exported(input_ids=batch, use_cache=False).logits[0]  # (L, V)
        sums.add(ids, scored, own, forced, free)
        choices = zip(scores, chosen, (o[2] for o in forced_run), (o[2] for o in free_run))
        for layer_scores, own_choice, other_choice, free_choice in choices:
            sums.add_choices(layer_scores, own_choice, other_choice, free_choice)
    return sums.parity()


def load_plain(folder: Path) -> PreTrainedModel:
    """Load an exported model as any user of transformers does, in float32.

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
    """Collect the outputs of the routers in one forward, layer by layer."""
    seen: list[tuple[Tensor, ...]] = []
    hooks = [router.register_forward_hook(lambda _module, _inputs, output: seen.append(output)) for router in routers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _forced(routers: list[torch.nn.Module], chosen: list[Tensor], scoring: Scoring) -> Iterator[None]:
    """Make the routers choose `chosen`, for each layer (T, K), and weigh the experts by their own logits."""

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
        positions = scored[1:].nonzero()[:, 0]  # positions whose next token is scored
        self.scored += len(positions)
        for name, logits in (("nll", own), ("exported_nll", free)):
            nll = torch.nn.functional.cross_entropy(logits[positions].float(), ids[positions + 1], reduction="sum")
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
    """True where two choices are different sets: (L, K) and (L, K') -> (L) bool. K' > K for some approximations."""
    if own.shape != other.shape:
        return torch.ones(len(own), dtype=torch.bool)
    return flipped(own.sort(-1).values, other.sort(-1).values)


def _exp(nats: float) -> float:
    return float(torch.tensor(min(nats, 700.0), dtype=torch.float64).exp())
