"""FactorMix: split a pretrained transformer's feed-forward networks into sparse experts that really run faster."""

from factormix.factor.config import FactorConfig, HealConfig
from factormix.factor.factorize import factorize
from factormix.factor.heal import heal
from factormix.loading import load
from factormix.nn import Layout, SparseFFN, quantize
from factormix.run.errors import FactorMixError

__version__ = "0.1.0"
__all__ = [
    "FactorConfig",
    "FactorMixError",
    "HealConfig",
    "Layout",
    "SparseFFN",
    "factorize",
    "heal",
    "load",
    "quantize",
]
