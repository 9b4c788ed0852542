"""Choose which tokens of a text a model must predict, and which tokens it sees.

    next_tokens(packed)                                   # causal models: every token, from the tokens before it
    masked_tokens(packed, tokenizer.mask_token_id)        # masked models: some hidden tokens, from all others

`evaluate.perplexity` and `evaluate.suite` take either of them in place of a packed text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from factormix.data.packing import Packed
from factormix.run.errors import FactorMixError

MASKED_SHARE = 0.15  # BERT's share (arXiv 1810.04805, section 3.1)


@dataclass(frozen=True)
class Asked:
    """Tokens to predict, in N windows of L tokens.

    Attributes:
        shown: (N, L) int64, the tokens that the model reads.
        where: (N, L) bool, True at the positions whose logits are scored.
        wanted: (N, L) int64, the token that the logits at a position must predict.
        token: "next" if the model may use the tokens up to a position, "masked" if it may use all that are shown.
    """

    shown: Tensor
    where: Tensor
    wanted: Tensor
    token: Literal["next", "masked"]


def next_tokens(packed: Packed) -> Asked:
    """Ask for every scored token at the position before it. The first token of a window is not asked for."""
    ids, scored = torch.as_tensor(packed.input_ids), torch.as_tensor(packed.scored).bool()  # (N, L), (N, L)
    where = scored.roll(-1, dims=1)  # (N, L)
    where[:, -1] = False
    return Asked(ids, where, ids.roll(-1, dims=1), "next")


def masked_tokens(packed: Packed, mask_token: int, seed: int = 0, share: float = MASKED_SHARE) -> Asked:
    """Ask for a random share of the scored tokens, each replaced by the mask token.

    Args:
        packed: the windows.
        mask_token: id of the mask token.
        seed: the same text and seed give the same masks.
        share: expected share of the scored tokens that are masked, 0 to 1.

    Raises:
        FactorMixError: no token was drawn.
    """
    ids, scored = torch.as_tensor(packed.input_ids), torch.as_tensor(packed.scored).bool()  # (N, L), (N, L)
    drawn = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < share  # (N, L)
    where = scored & drawn
    if not bool(where.any()):
        raise FactorMixError(f"no token was masked of {int(scored.sum())} of text; give a longer text.")
    return Asked(ids.masked_fill(where, mask_token), where, ids, "masked")
