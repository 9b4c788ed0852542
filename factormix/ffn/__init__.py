"""Where the FFN is: one view of the FFN of any Hugging Face family."""

from factormix.ffn.families import FAMILIES, Family, Layout
from factormix.ffn.site import DenseFFN, FFNSite, FFNWeights
from factormix.ffn.surgery import find_sites, get, isolate, swap, weights
from factormix.ffn.widen import set_inner, widen

__all__ = [
    "FAMILIES",
    "DenseFFN",
    "FFNSite",
    "FFNWeights",
    "Family",
    "Layout",
    "find_sites",
    "get",
    "isolate",
    "set_inner",
    "swap",
    "weights",
    "widen",
]
