"""The distance of a model's output distributions from a teacher's: what healing minimises, and MixDA's L_S."""

from __future__ import annotations

from torch import Tensor


def distillation(student: Tensor, teacher: Tensor, scored: Tensor) -> Tensor:
    """Mean over scored tokens of KL(teacher || student) of the output distributions.

    Args:
        student, teacher: logits (B, L, V).
        scored: (B, L) bool, the positions that count.
    """
    log_q = student[scored].float().log_softmax(-1)  # (T, V)
    log_p = teacher[scored].float().log_softmax(-1)  # (T, V)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()
