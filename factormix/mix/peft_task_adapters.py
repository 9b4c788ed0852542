"""Task adapters that PEFT makes: LoRA and prefix tuning, inside a model whose domain adapters are PEFT's too.

Both files of the directory are PEFT's (adapter_config.json, adapter_model.safetensors, its names of tensors), so
``PeftModel.from_pretrained(base, "task_adapter")`` takes them on the base without domains.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, TaskType
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from factormix.ffn import FFNSite
from factormix.mix.task_adapters import TaskAdapter, TaskAdapterSpec, check_tensors
from factormix.run.errors import FactorMixError

NAME = "task"  # what PEFT calls the adapter
CACHE_ARGUMENTS = ("cache", "past_key_values")  # newer and older transformers
_IN_PEFT_FILES = "base_model.model."


class LoraAdapter(TaskAdapter):
    """LoRA on the attention projections that PEFT chooses for the family; alpha is twice the rank.

    Its weights are inside the model; nothing of it is registered here.
    """

    def __init__(self, spec: TaskAdapterSpec, model: PreTrainedModel, sites: Sequence[FFNSite]) -> None:
        super().__init__(spec)
        targets = lora_targets(model, sites)
        transposed = all(isinstance(model.get_submodule(target), Conv1D) for target in targets)
        self.config = LoraConfig(
            r=spec.rank, lora_alpha=2 * spec.rank, target_modules=targets, fan_in_fan_out=transposed
        )
        of_domains = model.__dict__.pop("peft_config", None)  # else PEFT would count LoRA among the domains
        try:
            tuner = LoraModel(model, {NAME: self.config}, NAME)
        finally:
            model.__dict__.pop("peft_config", None)
            if of_domains is not None:
                model.peft_config = of_domains
        self.layers: dict[str, LoraLayer] = {n: m for n, m in tuner.model.named_modules() if isinstance(m, LoraLayer)}

    def _parameters_by_name(self) -> dict[str, nn.Parameter]:
        """By their names in PEFT's files."""
        return {
            f"{_IN_PEFT_FILES}{name}.lora_{letter}.weight": getattr(layer, f"lora_{letter}")[NAME].weight
            for name, layer in self.layers.items()
            for letter in "AB"
        }

    def trained(self) -> list[nn.Parameter]:
        """The matrices A and B."""
        return list(self._parameters_by_name().values())

    def enable(self, on: bool) -> None:
        """Run LoRA, or the projections alone. PEFT changes what trains here; `MixModel` puts it back."""
        for layer in self.layers.values():
            layer.enable_adapters(on)

    def tensors(self) -> dict[str, Tensor]:
        """As PEFT's files have them."""
        return {name: parameter.detach() for name, parameter in self._parameters_by_name().items()}

    @torch.no_grad()
    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Take the tensors of PEFT's file."""
        check_tensors(self.tensors(), tensors, "task adapter 'lora'")
        for name, parameter in self._parameters_by_name().items():
            parameter.copy_(tensors[name])


class PrefixAdapter(TaskAdapter):
    """Prefix tuning: virtual keys and values at every layer, handed to the model as a filled cache.

    Attributes:
        argument: of the model's forward that takes the cache.
        encoder: PEFT's embedding of the virtual tokens.
    """

    def __init__(self, spec: TaskAdapterSpec, model: PreTrainedModel) -> None:
        super().__init__(spec)
        self.argument = cache_argument(model)
        self.config = PrefixTuningConfig(num_virtual_tokens=spec.tokens, task_type=TaskType.CAUSAL_LM)
        made = PeftModel(model, self.config, adapter_name=NAME)
        self.encoder = made.prompt_encoder[NAME]
        self.__dict__["made"] = made  # not registered: the whole model would be part of the adapter
        self.enabled = True

    def enable(self, on: bool) -> None:
        """Give the model the prefix, or not."""
        self.enabled = on

    def prefix(self, batch: int) -> dict[str, Any]:
        """A fresh cache of `spec.tokens` positions for so many sequences; nothing while switched off."""
        return {self.argument: self.__dict__["made"].get_prompt(batch)} if self.enabled else {}

    @property
    def _embedding(self) -> nn.Parameter:
        return cast(nn.Parameter, self.encoder.get_submodule("embedding").weight)

    def tensors(self) -> dict[str, Tensor]:
        """As PEFT's files have them."""
        return {"prompt_embeddings": self._embedding.detach()}

    @torch.no_grad()
    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Take the tensors of PEFT's file."""
        check_tensors(self.tensors(), tensors, "task adapter 'prefix'")
        self._embedding.copy_(tensors["prompt_embeddings"])


def lora_targets(model: PreTrainedModel, sites: Sequence[FFNSite]) -> list[str]:
    """Paths of the projections that LoRA adapts: PEFT's choice for the family, none of them in an FFN.

    Raises:
        FactorMixError: PEFT has no choice for the family.
    """
    kind = model.config.model_type
    chosen = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
    names = [chosen] if isinstance(chosen, str) else chosen or []
    ffns = [f"{site.name}." for site in sites]
    found = [
        name
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in names
        and isinstance(module, (nn.Linear, Conv1D))
        and not any(f"{name}.".startswith(ffn) for ffn in ffns)
    ]
    if not found:
        raise FactorMixError(
            f"task adapter 'lora': PEFT names no attention projections for {kind!r} models. Use 'pfeiffer' or "
            "'houlsby', which work for every family."
        )
    return found


def cache_argument(model: PreTrainedModel) -> str:
    """What the model's forward calls the keys and values of earlier tokens.

    Raises:
        FactorMixError: they cannot be handed in, with the reason.
    """
    arguments = inspect.signature(model.base_model.forward).parameters
    found = next((name for name in CACHE_ARGUMENTS if name in arguments), None)
    if found is None or not model.can_generate():
        raise FactorMixError(
            f"task adapter 'prefix': {type(model).__name__} takes no keys and values of earlier tokens, which is what "
            "a prefix is; only decoders do. Use 'pfeiffer', 'houlsby' or 'lora'."
        )
    return found
