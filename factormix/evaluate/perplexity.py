"""Compute the perplexity of a text, and a model's distance from its dense base, in one pass over the text.

    packed = pack(texts, tokenizer, window=512)
    score = evaluate_text(model, packed, base=dense)
    score.model, score.base, score.ratio, score.ratio_stderr, score.top1, score.kl
    evaluate_text(masked_lm, masked_tokens(packed, tokenizer.mask_token_id), base=dense)    # masked tokens

Windows do not overlap. If the tokenizer has a beginning-of-sequence token, it opens each window and is not scored. The
cross-entropy is computed in float32 for every dtype of the model, a few rows of logits at a time. `batch_size` windows
run together. Only one batch's logits are in memory, those of the base and of one model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from factormix.data.packing import Packed
from factormix.evaluate.asked import Asked, next_tokens
from factormix.evaluate.causal import check_masked, check_next_token
from factormix.run.errors import FactorMixError
from factormix.run.progress import progress

LOGIT_BYTES = 256 * 2**20  # by default, the most bytes of float32 logits of one forward
CHUNK_BYTES = 32 * 2**20  # bytes of float32 logits that are turned into probabilities at a time
RESAMPLES = 1000  # bootstrap draws for the standard error


@dataclass(frozen=True)
class TextScore:
    """The scores of one model on one text. All numbers that need the base are None if no base was given."""

    tokens: int
    """number of tokens scored"""
    windows: int
    """number of windows they came from"""
    model: float
    """perplexity of the model: exp of the mean cross-entropy, in nats, of next tokens or of masked tokens"""
    base: float | None = None
    """perplexity of the base on the same tokens"""
    ratio: float | None = None
    """perplexity of the model divided by that of the base"""
    ratio_stderr: float | None = None
    """standard error of the ratio, by paired bootstrap over windows; None with fewer than two windows"""
    top1: float | None = None
    """share of tokens, 0 to 1, for which model and base have the same most likely token"""
    kl: float | None = None
    """mean KL(base || model) of their distributions, in nats per token"""

    def perplexity_dict(self) -> dict[str, float | int | None]:
        """The entry ``perplexity.<stem>``, which docs/json.md describes."""
        keys = ("base", "model", "ratio", "ratio_stderr", "tokens")
        return {key: getattr(self, key) for key in keys}

    def agreement_dict(self) -> dict[str, float | None]:
        """The entry ``agreement.<stem>``, which docs/json.md describes."""
        return {"top1": self.top1, "kl": self.kl}


class _Sums:
    """Sums over the scored tokens of each window, float64 (N,)."""

    def __init__(self, windows: int) -> None:
        self.nll = torch.zeros(windows, dtype=torch.float64)
        self.base_nll = torch.zeros(windows, dtype=torch.float64)
        self.kl = torch.zeros(windows, dtype=torch.float64)
        self.same = torch.zeros(windows, dtype=torch.float64)


def evaluate_text(
    model: nn.Module,
    text: Packed | Asked,
    base: nn.Module | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    quiet: bool = True,
) -> TextScore:
    """Score one model on one packed text, and compare it with its base if one is given.

    Args:
        model: a causal or a masked language model; ``model(input_ids=(B, L)).logits`` is (B, L, V).
        text: packed windows for a causal model, the result of `asked.masked_tokens` for a masked model.
        base: the dense model to compare with, which has the same vocabulary.
        batch_size: windows in one forward. By default as many as keep the logits of one forward under 256 MiB.
        seed: seed of the bootstrap.
        quiet: show no progress line.

    Raises:
        FactorMixError: a model does not predict that kind of token, the vocabularies differ, there is no token to
            score, or the cross-entropy is not finite.
    """
    return evaluate_text_for({"model": model}, text, base, batch_size, seed, quiet)["model"]


def evaluate_text_for(
    models: Mapping[str, nn.Module],
    text: Packed | Asked,
    base: nn.Module | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    quiet: bool = True,
) -> dict[str, TextScore]:
    """Like `evaluate_text`, for several models by name. The base runs once for all of them."""
    asked = text if isinstance(text, Asked) else next_tokens(text)
    counts = asked.where.sum(1)  # (N,)
    if not bool(counts.any()):
        raise FactorMixError("no token to score: the text is shorter than two tokens. Give a longer text.")
    everyone = {**models} if base is None else {**models, "base": base}
    for name, model in everyone.items():
        (check_next_token if asked.token == "next" else check_masked)(model, name)
    sums = {name: _Sums(len(counts)) for name in models}
    was_training = [model for model in everyone.values() if model.training]
    try:
        for model in was_training:
            model.eval()
        size = batch_size or _batch_size(everyone.values(), asked.shown.shape[1])
        batches = range(0, len(counts), size)
        for start in progress(batches, label="perplexity", total=len(batches), quiet=quiet):
            rows = slice(start, start + size)
            part = Asked(asked.shown[rows], asked.where[rows], asked.wanted[rows], asked.token)
            _score_batch(models, base, part, {name: (s, start) for name, s in sums.items()})
    finally:
        for model in was_training:
            model.train()
    return {name: _score(name, s, counts, base is not None, seed) for name, s in sums.items()}


def bootstrap_ratio(difference: Tensor, counts: Tensor, seed: int = 0, resamples: int = RESAMPLES) -> float | None:
    """Standard error of exp(sum of differences / sum of tokens) over windows drawn with replacement.

    Args:
        difference: (N,) sum over a window's tokens of model's less base's cross-entropy, nats.
        counts: (N,) tokens scored in each window.
        seed: of the draws.
        resamples: how many draws.
    """
    windows = len(counts)
    if windows < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    difference, weight = difference.double(), counts.double()
    ratios = []
    for _ in range(resamples):
        drawn = torch.randint(windows, (windows,), generator=generator)
        total = weight[drawn].sum()
        if total > 0:
            ratios.append((difference[drawn].sum() / total).exp())
    return float(torch.stack(ratios).std())


def _score_batch(
    models: Mapping[str, nn.Module],
    base: nn.Module | None,
    asked: Asked,  # of B windows
    sums: Mapping[str, tuple[_Sums, int]],
) -> None:
    window, position = asked.where.nonzero(as_tuple=True)  # (M,), (M,): row of the batch, position of the logits
    wanted = asked.wanted[window, position]  # (M,)
    with torch.inference_mode():
        base_logits = None if base is None else _logits(base, asked.shown)  # (B, L, V)
        for name, model in models.items():
            logits = _logits(model, asked.shown)  # (B, L, V)
            if base_logits is not None and base_logits.shape[-1] != logits.shape[-1]:
                raise FactorMixError(
                    f"{name} has {logits.shape[-1]} logits and its base {base_logits.shape[-1]}: "
                    "compare a model with the dense model it was made from."
                )
            step = max(1, CHUNK_BYTES // (4 * logits.shape[-1]))
            total, start = sums[name]
            for first in range(0, len(wanted), step):
                part = slice(first, first + step)
                place = (window[part], position[part])
                _add(total, start, place, wanted[part], logits, base_logits)
            del logits


def _add(
    total: _Sums, start: int, place: tuple[Tensor, Tensor], wanted: Tensor, logits: Tensor, base_logits: Tensor | None
) -> None:
    """Add m tokens: `place` (m,), (m,) are their rows in logits (B, L, V), `wanted` (m,) are the right tokens."""
    rows = start + place[0]  # (m,): window of each token
    device = logits.device
    log_p = logits[place[0].to(device), place[1].to(device)].float().log_softmax(-1)  # (m, V)
    wanted = wanted.to(device)[:, None]  # (m, 1)
    total.nll.index_add_(0, rows, -log_p.gather(1, wanted)[:, 0].double().cpu())
    if base_logits is None:
        return
    base_device = base_logits.device
    base_rows = base_logits[place[0].to(base_device), place[1].to(base_device)]  # (m, V)
    log_q = base_rows.to(device).float().log_softmax(-1)  # (m, V)
    total.base_nll.index_add_(0, rows, -log_q.gather(1, wanted)[:, 0].double().cpu())
    same = log_p.argmax(-1) == log_q.argmax(-1)  # (m,)
    total.same.index_add_(0, rows, same.double().cpu())
    kl = torch.nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)  # (m,)
    total.kl.index_add_(0, rows, kl.double().cpu())


def _score(name: str, sums: _Sums, counts: Tensor, compared: bool, seed: int) -> TextScore:
    tokens, windows = int(counts.sum()), int((counts > 0).sum())
    for who, nll in ((name, sums.nll), ("base", sums.base_nll)):
        if not bool(torch.isfinite(nll).all()):
            first = int((~torch.isfinite(nll)).nonzero()[0, 0])
            raise FactorMixError(
                f"the cross-entropy of {who} is not finite, first in window {first}, because its weights or "
                "activations hold NaN or infinity. Check the checkpoint, or evaluate in float32."
            )
    model = _exp(float(sums.nll.sum()) / tokens)
    if not compared:
        return TextScore(tokens, windows, model)
    difference = sums.nll - sums.base_nll  # (N,)
    return TextScore(
        tokens=tokens,
        windows=windows,
        model=model,
        base=_exp(float(sums.base_nll.sum()) / tokens),
        ratio=_exp(float(difference.sum()) / tokens),
        ratio_stderr=bootstrap_ratio(difference[counts > 0], counts[counts > 0], seed),
        top1=float(sums.same.sum()) / tokens,
        kl=max(0.0, float(sums.kl.sum()) / tokens),  # rounding may leave -1e-9 for equal distributions
    )


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits (B, L, V) for ids (B, L), on the device of the model, in its dtype."""
    device = next(model.parameters()).device
    return model(input_ids=ids.to(device), use_cache=False).logits  # type: ignore[no-any-return]


def _batch_size(models: Any, length: int) -> int:
    vocab = max(int(model.get_output_embeddings().weight.shape[0]) for model in models)
    return int(max(1, LOGIT_BYTES // (4 * length * vocab)))


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # float64 overflows beyond 709
