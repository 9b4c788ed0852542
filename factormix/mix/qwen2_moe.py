"""Write one gated domain as a Qwen2-MoE model: a plain transformers checkpoint that stock engines run with its gate.

    F(x) + 2 sigmoid(w . x) A(x)  =  1 * F(x)  +  sigmoid(w . x) * (2 A(x))
                                     the only routed expert    the shared expert under its gate

A Qwen2-MoE block adds the top-k of its routed experts and a shared expert times the sigmoid of a linear gate. Here the
FFN becomes the only routed expert, whose normalised weight is 1. The domain adapter becomes the shared expert, with its
down projection doubled, and the domain gate's row becomes the gate. Layers without an adapter keep their FFN
(``mlp_only_layers``). The result is exact to rounding. What does not fit is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from factormix.ffn import FFNSite, FFNWeights, weights
from factormix.mix.gate_files import GATE_WEIGHTS, check_domains, read_gate_config
from factormix.mix.gated import OWN, own_rows
from factormix.mix.merge import Merged, read_neurons
from factormix.nn import FactorMixMixin, sites_of
from factormix.run.errors import FactorMixError
from factormix.run.tensors import read_tensors

# Classes whose layers equal Qwen2-MoE's except for the FFN, and whether their query, key and value have biases.
FITTING = {"LlamaForCausalLM": False, "MistralForCausalLM": False, "Qwen2ForCausalLM": True}
CARRIED = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps use_cache tie_word_embeddings rope_parameters "
    "attention_dropout pad_token_id bos_token_id eos_token_id"
).split()


def to_qwen2_moe(
    model: PreTrainedModel, adapters: Mapping[str, str | Path], gate: str | Path
) -> tuple[Qwen2MoeForCausalLM, Merged]:
    """Make the Qwen2-MoE model with the same output as a base with one gated domain.

    Args:
        model: the dense base; it stays unchanged.
        adapters: the one adapter directory, by its domain's name.
        gate: the folder of its gates, or "own" for the adapter's own gate.

    Returns:
        The model, and what was added.

    Raises:
        FactorMixError: the base, the domain or the gate does not fit a Qwen2-MoE block, with the reason; or the
            adapter or the gates were made for another model.
    """
    if reason := why_not(model):
        raise FactorMixError(f"{type(model).__name__} is no Qwen2-MoE model with gated domains: {reason}.")
    if len(adapters) != 1:
        raise FactorMixError(
            f"a Qwen2-MoE block has one shared expert, so it takes one domain; received {', '.join(adapters)}. Merge "
            "the others with fixed weights first, with `factormix merge` and no --gate."
        )
    (folder,) = adapters.values()
    rows = own_rows(folder) if str(gate) == OWN else _rows(adapters, gate)
    sites = sites_of(model)
    neurons = read_neurons(model, sites, folder, 2.0)  # 2 sigmoid(w.x) A(x) = sigmoid(w.x) (2 A(x))
    adapted = [site for site in sites if site.index in neurons]
    wanted = {f"{site.index}.weight": (1, site.hidden) for site in adapted}
    if {name: tuple(row.shape) for name, row in rows.items()} != wanted:
        raise FactorMixError(
            f"the gates in {str(gate)!r} belong to other sites than the adapter {str(folder)!r}. Adapt again."
        )
    width = len(next(iter(neurons.values())).up)
    made = Qwen2MoeForCausalLM(_config(model, adapted, width)).eval()
    cast(Any, made).to(device=model.device, dtype=model.dtype)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not _is_in(name, adapted)}
    for site in adapted:
        tensors |= _block(model, site, neurons[site.index], rows[f"{site.index}.weight"])
    made.load_state_dict(tensors)
    made.tie_weights()
    if model.generation_config is not None:
        made.generation_config = model.generation_config
    added = made.num_parameters() - model.num_parameters()
    return made, Merged(
        inner=adapted[0].inner,
        neurons=width * len(adapted),
        zero_neurons=0,
        parameters=added,
        bytes=added * model.dtype.itemsize,
        flops_per_token=2 * added,
    )


def _rows(adapters: Mapping[str, str | Path], gate: str | Path) -> dict[str, Tensor]:
    """The rows of a stage-2 gate. It must weigh this domain, and be of the kind that the block has."""
    config = read_gate_config(gate)
    check_domains(config, adapters, gate)
    if config["kind"] != "sigmoid" or config["start"] != "on":
        raise FactorMixError(
            f"the gates in {str(gate)!r} are of kind {config['kind']!r} and started {config['start']!r}, but a "
            "Qwen2-MoE block has a sigmoid gate without bias. Allowed: 'sigmoid' that started 'on'."
        )
    return read_tensors(Path(gate) / GATE_WEIGHTS)


def why_not(model: PreTrainedModel) -> str:
    """Why a base differs from a Qwen2-MoE model in more than its FFNs; "" if it does not."""
    config: Any = model.config
    if isinstance(model, FactorMixMixin):
        return "its FFNs are sparse already; take the dense model"
    name = type(model).__name__
    if name not in FITTING:
        return f"its layers are those of another family; allowed: {', '.join(FITTING)}"
    if getattr(config, "attention_bias", False):
        return "its attention has an output bias (attention_bias)"
    if getattr(config, "mlp_bias", False):
        return "its FFNs have biases (mlp_bias)"
    local = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if local or (name == "MistralForCausalLM" and config.sliding_window is not None):
        return "its attention sees a sliding window"
    return ""


def _config(model: PreTrainedModel, adapted: list[FFNSite], width: int) -> Qwen2MoeConfig:
    given: Any = model.config
    values = {name: getattr(given, name) for name in CARRIED}
    head = getattr(given, "head_dim", None)
    if head is not None and head != given.hidden_size // given.num_attention_heads:
        values["head_dim"] = head
    moe = {site.layers[0] for site in adapted}
    return Qwen2MoeConfig(
        **values,
        qkv_bias=FITTING[type(model).__name__],
        num_experts=1,
        num_experts_per_tok=1,
        norm_topk_prob=True,
        moe_intermediate_size=given.intermediate_size,
        shared_expert_intermediate_size=width,
        decoder_sparse_step=1,
        mlp_only_layers=[i for i in range(given.num_hidden_layers) if i not in moe],
        router_aux_loss_coef=0.0,
        dtype=model.dtype,
    )


def _is_in(name: str, sites: list[FFNSite]) -> bool:
    """True if the tensor of this name belongs to the FFN of one of the sites."""
    return any(name.startswith(f"{site.name}.") for site in sites)


@torch.no_grad()
def _block(model: PreTrainedModel, site: FFNSite, domain: FFNWeights, row: Tensor) -> dict[str, Tensor]:
    """The tensors of one block by name. The FFN is the only routed expert, and the domain is the shared expert."""
    ffn, like = weights(model, site), model.dtype
    parts = {
        "experts.gate_up_proj": torch.cat([cast(Tensor, ffn.gate), ffn.up])[None],  # (1, 2I, H)
        "experts.down_proj": ffn.down.T[None],  # (1, H, I)
        "gate.weight": torch.zeros(1, site.hidden),  # the only expert is always chosen, with weight 1
        "shared_expert.gate_proj.weight": cast(Tensor, domain.gate),  # (r, H)
        "shared_expert.up_proj.weight": domain.up,  # (r, H)
        "shared_expert.down_proj.weight": domain.down.T,  # (H, r)
        "shared_expert_gate.weight": row,  # (1, H)
    }
    return {f"{site.name}.{name}": tensor.to(like).contiguous() for name, tensor in parts.items()}
