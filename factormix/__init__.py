"""FactorMix: split a pretrained transformer's feed-forward networks into sparse experts that really run faster."""

from factormix.checkpoint import load
from factormix.nn import Layout, SparseFFN
from factormix.run.errors import FactorMixError

__version__ = "0.1.0"
__all__ = ["FactorMixError", "Layout", "SparseFFN", "load"]
