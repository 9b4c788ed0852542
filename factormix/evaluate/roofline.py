"""Compute the limits of a measured speed: the bytes that decoding reads, and the operations of prefill.

    with ExpertsHit(model) as seen:
        ...                                             # a prompt, then decoding steps
    decode_bytes(model, batch, seen.share(skip=1), cache_bytes(cache))

One decoding step reads every weight once, but only those experts that some row of the batch chose. These are counted
while the model runs, not estimated. The step reads the key-value cache once too. The ratio of two models' costs is the
largest speed-up that reading or computing less can give.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from factormix.evaluate.cost import bytes_per_token, flops_per_token
from factormix.nn import SparseFFN


class ExpertsHit:
    """Counts, inside a ``with`` block, how many different experts each call of each SparseFFN of `model` chooses."""

    def __init__(self, model: nn.Module) -> None:
        self._ffns = [m for m in model.modules() if isinstance(m, SparseFFN) and m.router is not None]
        self._shares: dict[nn.Module, list[float]] = {ffn: [] for ffn in self._ffns}
        self._hooks = ExitStack()

    def __enter__(self) -> ExpertsHit:
        for ffn in self._ffns:
            assert ffn.router is not None

            def note(_: nn.Module, __: Any, chosen: tuple[Tensor, Tensor], ffn: SparseFFN = ffn) -> None:
                self._shares[ffn].append(len(chosen[1].unique()) / ffn.spec.layout.routed)

            self._hooks.callback(ffn.router.register_forward_hook(note).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def share(self, skip: int = 0) -> dict[nn.Module, float]:
        """For each FFN, the mean over calls of the share of its experts that a call chose, 0 to 1.

        Args:
            skip: number of first calls that do not count, such as those of a prompt.
        """
        return {ffn: sum(calls[skip:]) / len(calls[skip:]) for ffn, calls in self._shares.items() if calls[skip:]}


def decode_bytes(model: nn.Module, batch: int, hit: Mapping[nn.Module, float], cache: float) -> float:
    """Bytes that one decoding step reads.

    Args:
        model: any transformer.
        batch: rows of the batch.
        hit: by sparse FFN, the share of its experts that the step reads, from `ExpertsHit.share`.
        cache: bytes of keys and values, from `cache_bytes`.
    """
    return bytes_per_token(model, batch, hit) + cache


def prefill_flops(model: nn.Module, tokens: int) -> float:
    """Floating-point operations of one window of `tokens` tokens. The output head runs for the last token only."""
    head = flops_per_token(model) - flops_per_token(model, head=False)
    return tokens * flops_per_token(model, context=tokens / 2, head=False) + head


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a transformers cache holds."""
    parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))
