"""Find the attention's output projection in the layer of an FFN: the Linear whose output joins the residual stream.

Houlsby task adapters are placed behind it. As in `families`, a family is data: `OUTPUTS` lists names relative to the
layer, tried in order, so that no code above this file needs to know a family.
"""

from __future__ import annotations

import re

from torch import nn

from factormix.ffn.site import FFNSite
from factormix.run.errors import FactorMixError

OUTPUTS = (
    "self_attn.o_proj",  # llama and most decoders
    "self_attn.dense",  # phi
    "self_attn.out_proj",  # opt
    "attention.output.dense",  # bert and its like
    "attention.out_lin",  # distilbert
    "attention.dense",  # albert, gpt_neox
    "attn.c_proj",  # gpt2
    "attn.Wo",  # modernbert
    "layer.0.SelfAttention.o",  # t5
)


def attention_output(model: nn.Module, site: FFNSite) -> str:
    """Dotted path of the attention's output projection in the layer of an FFN, (..., H) -> (..., H).

    Args:
        model: the model the site was found in.
        site: one of its FFNs.

    Raises:
        FactorMixError: the layer has none of `OUTPUTS`.
    """
    layer = layer_of(site)
    for name in OUTPUTS:
        try:
            model.get_submodule(f"{layer}.{name}")
        except AttributeError:
            continue
        return f"{layer}.{name}"
    raise FactorMixError(
        f"the attention of {layer} ends in none of {', '.join(OUTPUTS)}; add its name to OUTPUTS of "
        "factormix/ffn/attention.py, or use adapters beside the FFN only."
    )


def layer_of(site: FFNSite) -> str:
    """Dotted path of the layer that holds the FFN: up to the last index of the table's pattern."""
    words = site.paths.at.split(".")
    below = len(words) - 1 - max(i for i, word in enumerate(words) if word == "*")
    layer = site.at.split(".")[: len(site.at.split(".")) - below]
    assert re.fullmatch(r"\d+", layer[-1]), site.at
    return ".".join(layer)
