"""What a checkpoint holds, forward only: layout, router, sparse FFN, domain adapters, and the FactorMix model class."""

from factormix.nn.domain_adapter import DomainAdapter, DomainAdapterSpec
from factormix.nn.domain_ffn import DomainFFN
from factormix.nn.domain_gate import DomainGate
from factormix.nn.int8 import Int8Neurons
from factormix.nn.layout import Layout
from factormix.nn.model import FactorMixMixin, adopt, base_class, factormix_class, sites_of, vocabulary_head
from factormix.nn.quantize import Quantize, check_quantize, quantize, refuse_quantised
from factormix.nn.router import MLPRouter, NeuronRouter, Router
from factormix.nn.sparse_ffn import RoutedExperts, SharedNeurons, SparseFFN, SparseSpec

__all__ = [
    "DomainAdapter",
    "DomainAdapterSpec",
    "DomainFFN",
    "DomainGate",
    "FactorMixMixin",
    "Int8Neurons",
    "Layout",
    "MLPRouter",
    "NeuronRouter",
    "Quantize",
    "RoutedExperts",
    "Router",
    "SharedNeurons",
    "SparseFFN",
    "SparseSpec",
    "adopt",
    "base_class",
    "check_quantize",
    "factormix_class",
    "quantize",
    "refuse_quantised",
    "sites_of",
    "vocabulary_head",
]
