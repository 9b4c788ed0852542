"""What is asked of a model about a text: which tokens it is to predict, and what it sees of them.

    next_tokens(packed)                                   # causal models: every token, by those before it
    masked_tokens(packed, tokenizer.mask_token_id)        # masked language models: some, hidden, by all others

Both go to `evaluate.perplexity` and `evaluate.suite` in the place of a packed text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from factormix.data.packing import Packed
from factormix.run.errors import FactorMixError

MASKED_SHARE = 0.15  # BERT's (arXiv 1810.04805, section 3.1)


@dataclass(frozen=True)
class Asked:
    """Tokens to predict.

    Attributes:
        shown: (N, L) int64, what the model sees.
        where: (N, L) bool, True where its logits are judged.
        wanted: (N, L) int64, the token that they are to predict there.
        token: "next", which is known by the tokens up to its position; "masked", by all that are shown.
    """

    shown: Tensor
    where: Tensor
    wanted: Tensor
    token: Literal["next", "masked"]


def next_tokens(packed: Packed) -> Asked:
    """Every scored token, asked at the position before it; the first of a window has nothing before it."""
    ids, scored = torch.as_tensor(packed.input_ids), torch.as_tensor(packed.scored).bool()  # (N, L), (N, L)
    where = scored.roll(-1, dims=1)  # (N, L)
    where[:, -1] = False
    return Asked(ids, where, ids.roll(-1, dims=1), "next")


def masked_tokens(packed: Packed, mask_token: int, seed: int = 0, share: float = MASKED_SHARE) -> Asked:
    """A share of the scored tokens, each hidden behind the mask token; the same ones for the same text and seed.

    Args:
        packed: the windows.
        mask_token: its id.
        seed: of which tokens are hidden.
        share: of the scored tokens, in expectation.

    Raises:
        FactorMixError: nothing was drawn.
    """
    ids, scored = torch.as_tensor(packed.input_ids), torch.as_tensor(packed.scored).bool()  # (N, L), (N, L)
    drawn = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < share  # (N, L)
    where = scored & drawn
    if not bool(where.any()):
        raise FactorMixError(f"no token was masked of {int(scored.sum())} of text; give a longer text.")
    return Asked(ids.masked_fill(where, mask_token), where, ids, "masked")
