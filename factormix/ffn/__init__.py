"""Find, read and replace the FFNs of any Hugging Face family."""

from factormix.ffn.families import FAMILIES, Family, FFNPaths
from factormix.ffn.site import DenseFFN, FFNSite, FFNWeights
from factormix.ffn.surgery import copy_structure, find_sites, get, isolate, swap, weights
from factormix.ffn.widen import narrow, set_inner, widen

__all__ = [
    "FAMILIES",
    "DenseFFN",
    "FFNSite",
    "FFNWeights",
    "Family",
    "FFNPaths",
    "find_sites",
    "get",
    "isolate",
    "narrow",
    "set_inner",
    "copy_structure",
    "swap",
    "weights",
    "widen",
]
