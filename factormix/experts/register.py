"""The experts of stock MoE models run as FactorMix's own do, after one line.

    import factormix
    model.set_experts_implementation("factormix")     # Mixtral, Qwen-MoE, Granite-MoE, OLMoE and more

transformers looks the name up in ALL_EXPERTS_FUNCTIONS and hands over the module with its packed weights; importing
this file puts `experts_forward` there. `from_pretrained(..., experts_implementation="factormix")` is the same.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.activations import ACT2CLS
from transformers.integrations import moe

from factormix.experts.dispatch import run_experts
from factormix.experts.packed import PackedExperts
from factormix.run.errors import FactorMixError

NAME = "factormix"
_REMEDY = 'Use model.set_experts_implementation("grouped_mm") or "eager" for this model.'


def experts_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls in place of a stock experts module's forward.

    Args:
        module: holds ``gate_up_proj`` (R, 2W, H) or ``up_proj`` (R, W, H), and ``down_proj`` (R, H, W).
        hidden_states: (T, H).
        top_k_index: (T, K) int64, distinct in a row.
        top_k_weights: (T, K), what each chosen expert's output is multiplied by.

    Returns:
        (T, H) in the dtype of hidden_states.

    Raises:
        FactorMixError: experts of another form (transposed or interleaved weights, output biases, a gate of the model's
            own, a norm behind each expert, weights that are quantised or spread over devices).
    """
    return run_experts(hidden_states, top_k_index, top_k_weights, _packed(module)).to(hidden_states.dtype)


def _packed(module: nn.Module) -> PackedExperts:
    """The module's weights as they lie; no copy."""
    up, down = getattr(module, "gate_up_proj" if module.has_gate else "up_proj", None), module.down_proj
    reason = _other_form(type(module), module)
    if reason is None and not all(type(weight) in (Tensor, nn.Parameter) for weight in (up, down)):
        reason = f"weights of type {type(up).__name__} and {type(down).__name__}"
    if reason is not None:
        raise FactorMixError(
            f"{type(module).__name__} has {reason}; the implementation {NAME!r} runs plain packed experts. {_REMEDY}"
        )
    return PackedExperts(up, down, None, _activation(type(module.act_fn), type(module)), bool(module.has_gate))  # type: ignore[arg-type]


def _other_form(kind: type, module: nn.Module) -> str | None:
    """What these experts have that `PackedExperts` does not describe."""
    forms = {
        "transposed weights": module.is_transposed,
        "interleaved gate and up rows": not module.is_concatenated,
        "biases": module.has_bias,
        "a norm behind each expert": getattr(module, "has_post_expert_norm", False),
        "experts spread over devices": getattr(module, "_is_expert_parallel", False),
        "a gate of its own": module.has_gate and kind._apply_gate is not moe._default_apply_gate,  # type: ignore[attr-defined]
    }
    return next((form for form, present in forms.items() if present), None)


def _activation(act: type, owner: type) -> str:
    """The key of ACT2FN that makes such a module, without settings or parameters of its own."""
    for name, made in ACT2CLS.items():
        if made is act and name not in ("prelu", "xielu"):
            return str(name)
    raise FactorMixError(f"{owner.__name__} has the activation {act.__name__}, none of ACT2FN's plain ones. {_REMEDY}")


moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
