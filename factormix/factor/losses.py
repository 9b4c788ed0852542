"""Losses of the router and of healing.

PA is FactorLLM's prior-approximate router loss (section 3.3): the router is pulled towards a label that the frozen
dense FFN gave, without any task label.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from factormix.factor.labels import Labels

SOFT_TEMPERATURE = 1.0  # of pa-soft, in units of the gains' standard deviation


def router_loss(method: str, scores: Tensor, labels: Labels) -> Tensor:
    """Mean over tokens of the loss of router scores z (T, R) against labels.

    - ``bce``: each expert by itself, sigmoid(z_i) against 1 if it is in the label; an expert counts by how much is at
      stake, its gain's distance from the gain that divides the K best from the others, to mean 1 a token.
    - ``pa``: KL(y || softmax(z)), y = label / K.
    - ``pa-soft``: the same with y = softmax(gain / tau).
    - ``paper``: as released, y = softmax(label), which is nearly uniform (.37 against .13 for 2 of 4).

    Callers leave padding out of the rows.
    """
    if method == "bce":
        return F.binary_cross_entropy_with_logits(scores, labels.chosen, weight=_stakes(labels))
    if method == "pa":
        target = labels.chosen / labels.chosen.sum(1, keepdim=True)  # (T, R)
    elif method == "pa-soft":
        tau = SOFT_TEMPERATURE * labels.gain.std().clamp_min(1e-12)
        target = (labels.gain / tau).softmax(1)  # (T, R)
    else:
        target = labels.chosen.softmax(1)  # (T, R)
    return F.kl_div(scores.log_softmax(1), target, reduction="batchmean")


def _stakes(labels: Labels) -> Tensor:
    """(T, R) |gain - midpoint of the K-th and the next gain|, mean 1 in each row; 1 everywhere when K = R."""
    active, routed = int(labels.chosen[0].sum()), labels.gain.shape[1]
    if active == routed:
        return torch.ones_like(labels.gain)
    top = labels.gain.topk(active + 1, dim=1).values  # (T, K + 1)
    away = (labels.gain - top[:, -2:].mean(1, keepdim=True)).abs()  # (T, R)
    return away / away.mean(1, keepdim=True).clamp_min(1e-30)


def load_balance(scores: Tensor, chosen: Tensor) -> Tensor:
    """R * sum_i f_i p_i over a batch of tokens: 1 when both are even (Switch Transformer, equation 4).

    Args:
        scores: (T, R) router scores.
        chosen: (T, K) chosen experts. f_i is the share of choices that fall on i across the tokens, p_i the mean
            probability of i across them: balance is asked of the batch, never of a single token.
    """
    routed = scores.shape[1]
    share = torch.bincount(chosen.flatten(), minlength=routed).to(scores.dtype) / chosen.numel()  # (R,)
    return routed * (share * scores.softmax(1).mean(0)).sum()


def last_states(output: Any) -> Tensor:
    """The last hidden state (B, L, H) of a model's output, whatever its head; a head's output needs
    ``output_hidden_states``."""
    states = output.get("hidden_states") or output.get("decoder_hidden_states")
    return states[-1] if states else output.last_hidden_state  # type: ignore[no-any-return]


def hidden_distance(student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    """Mean over counted tokens of |h - h'|^2 / |h'|^2; states (B, L, H), counted (B, L) bool."""
    h, wanted = student[counted].float(), teacher[counted].float()  # (T, H) each
    return ((h - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)).mean()
