"""Sizes of this room's tiny models."""

from factormix.nn.sparse_ffn import SparseSpec

VOCAB, HIDDEN, INNER, LAYERS, HEADS = 97, 16, 48, 2, 2
SPEC = SparseSpec(
    hidden=HIDDEN, width=INNER // 8, shared=4, active=1, slices=8, activation="silu", gated=True
)  # S4A1E8
