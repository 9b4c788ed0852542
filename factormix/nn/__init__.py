"""What a checkpoint holds, forward only: layout, router, sparse FFN, and the FactorMix model class."""

from factormix.nn.layout import Layout
from factormix.nn.model import FactorMixMixin, adopt, base_class, factormix_class
from factormix.nn.router import Router
from factormix.nn.sparse_ffn import RoutedExperts, SharedNeurons, SparseFFN, SparseSpec

__all__ = [
    "FactorMixMixin",
    "Layout",
    "RoutedExperts",
    "Router",
    "SharedNeurons",
    "SparseFFN",
    "SparseSpec",
    "adopt",
    "base_class",
    "factormix_class",
]
