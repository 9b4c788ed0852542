"""Where the FFN is: one view of the FFN of any Hugging Face family."""

from factormix.ffn.families import FAMILIES, Family, Layout
from factormix.ffn.site import DenseFFN, FFNSite, FFNWeights
from factormix.ffn.surgery import find_sites, get, isolate, shared_copy, swap, weights
from factormix.ffn.widen import narrow, set_inner, widen

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
    "narrow",
    "set_inner",
    "shared_copy",
    "swap",
    "weights",
    "widen",
]
