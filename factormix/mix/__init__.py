"""MixDA: domain knowledge beside frozen FFNs (stage 1), and merging it into them."""
