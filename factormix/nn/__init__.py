"""What a checkpoint holds, forward only: layout, router, sparse FFN, domain adapters, and the FactorMix model class."""

from factormix.nn.domain_adapter import DomainAdapter, DomainAdapterSpec
from factormix.nn.domain_ffn import DomainFFN
from factormix.nn.domain_gate import DomainGate
from factormix.nn.layout import Layout
from factormix.nn.model import FactorMixMixin, adopt, base_class, factormix_class, sites_of, vocabulary_head
from factormix.nn.router import MLPRouter, NeuronRouter, Router
from factormix.nn.sparse_ffn import RoutedExperts, SharedNeurons, SparseFFN, SparseSpec

__all__ = [
    "DomainAdapter",
    "DomainAdapterSpec",
    "DomainFFN",
    "DomainGate",
    "FactorMixMixin",
    "Layout",
    "MLPRouter",
    "NeuronRouter",
    "RoutedExperts",
    "Router",
    "SharedNeurons",
    "SparseFFN",
    "SparseSpec",
    "adopt",
    "base_class",
    "factormix_class",
    "sites_of",
    "vocabulary_head",
]
