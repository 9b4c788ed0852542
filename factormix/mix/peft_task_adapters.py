"""Task adapters from PEFT: LoRA and prefix tuning, inside a model whose domain adapters are in PEFT's container too.

Their directory has PEFT's two files (adapter_config.json, adapter_model.safetensors) with PEFT's names of tensors. So
``PeftModel.from_pretrained(base, "task_adapter")`` loads them onto the base without domains.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, TaskType
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from factormix.ffn import FFNSite
from factormix.mix.adapter_files import CONFIG, WEIGHTS
from factormix.mix.task_adapters import TaskAdapter, TaskAdapterSpec, check_tensors
from factormix.run.directory import write_json
from factormix.run.errors import FactorMixError

NAME = "task"  # the adapter's name in PEFT
CACHE_ARGUMENTS = ("cache", "past_key_values")  # the argument's names in newer and older transformers
_IN_PEFT_FILES = "base_model.model."


class _PeftAdapter(TaskAdapter):
    """A task adapter whose directory is PEFT's."""

    files: ClassVar[tuple[str, str]] = (CONFIG, WEIGHTS)
    config: PeftConfig

    def write_config(self, folder: Path) -> None:
        """Write adapter_config.json into a folder."""
        self.config.save_pretrained(str(folder))
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        write_json(folder / CONFIG, values | {"base_model_name_or_path": None, "inference_mode": True})


class LoraAdapter(_PeftAdapter):
    """LoRA on the attention projections that PEFT chooses for the family. alpha is twice the rank.

    Its weights are inside the model, and none of them is registered in this module.

    Args:
        spec: gives the rank.
        model: changed in place.
        sites: the model's FFNs, where LoRA is not applied.

    Raises:
        FactorMixError: PEFT names no projections for the family.
    """

    def __init__(self, spec: TaskAdapterSpec, model: PreTrainedModel, sites: Sequence[FFNSite]) -> None:
        super().__init__(spec)
        targets = lora_targets(model, sites)
        transposed = all(isinstance(model.get_submodule(target), Conv1D) for target in targets)
        self.config = LoraConfig(
            r=spec.rank, lora_alpha=2 * spec.rank, target_modules=targets, fan_in_fan_out=transposed
        )
        domain_configs = model.__dict__.pop("peft_config", None)  # otherwise PEFT would take LoRA for a domain
        try:
            tuner = LoraModel(model, {NAME: self.config}, NAME)
        finally:
            model.__dict__.pop("peft_config", None)
            if domain_configs is not None:
                model.peft_config = domain_configs
        self.layers: dict[str, LoraLayer] = {n: m for n, m in tuner.model.named_modules() if isinstance(m, LoraLayer)}

    def _parameters_by_name(self) -> dict[str, nn.Parameter]:
        """Its parameters by their names in PEFT's files."""
        return {
            f"{_IN_PEFT_FILES}{name}.lora_{letter}.weight": getattr(layer, f"lora_{letter}")[NAME].weight
            for name, layer in self.layers.items()
            for letter in "AB"
        }

    def trained(self) -> list[nn.Parameter]:
        """The matrices A and B."""
        return list(self._parameters_by_name().values())

    def enable(self, on: bool) -> None:
        """Switch LoRA on or off. PEFT changes which parameters train here, and `MixModel` restores that."""
        for layer in self.layers.values():
            layer.enable_adapters(on)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of PEFT's weights file, by name."""
        return {name: parameter.detach() for name, parameter in self._parameters_by_name().items()}

    @torch.no_grad()
    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Load the tensors of PEFT's weights file."""
        check_tensors(self.tensors(), tensors, "task adapter 'lora'")
        for name, parameter in self._parameters_by_name().items():
            parameter.copy_(tensors[name])


class PrefixAdapter(_PeftAdapter):
    """Prefix tuning: virtual keys and values at every layer, given to the model as a filled cache.

    Args:
        spec: gives the number of virtual tokens.
        model: stays unchanged.

    Attributes:
        argument: name of the model's argument that takes the cache.
        encoder: PEFT's embedding of the virtual tokens.

    Raises:
        FactorMixError: the model takes no cache.
    """

    def __init__(self, spec: TaskAdapterSpec, model: PreTrainedModel) -> None:
        super().__init__(spec)
        self.argument = cache_argument(model)
        self.config = PrefixTuningConfig(num_virtual_tokens=spec.tokens, task_type=TaskType.CAUSAL_LM)
        made = PeftModel(model, self.config, adapter_name=NAME)
        self.encoder = made.prompt_encoder[NAME]
        self.__dict__["made"] = made  # not registered, because the whole model would become part of the adapter
        self.enabled = True

    def enable(self, on: bool) -> None:
        """Switch the prefix on or off."""
        self.enabled = on

    def prefix(self, batch: int) -> dict[str, Any]:
        """A fresh cache of `spec.tokens` positions for `batch` sequences; empty while switched off."""
        return {self.argument: self.__dict__["made"].get_prompt(batch)} if self.enabled else {}

    @property
    def _embedding(self) -> nn.Parameter:
        return cast(nn.Parameter, self.encoder.get_submodule("embedding").weight)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of PEFT's weights file, by name."""
        return {"prompt_embeddings": self._embedding.detach()}

    @torch.no_grad()
    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Load the tensors of PEFT's weights file."""
        check_tensors(self.tensors(), tensors, "task adapter 'prefix'")
        self._embedding.copy_(tensors["prompt_embeddings"])


def lora_targets(model: PreTrainedModel, sites: Sequence[FFNSite]) -> list[str]:
    """Paths of the projections that LoRA adapts: those that PEFT chooses for the family, without any in an FFN.

    Raises:
        FactorMixError: PEFT chooses none for the family.
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
    """The name of the model's argument that takes the keys and values of earlier tokens.

    Raises:
        FactorMixError: the model has no such argument.
    """
    arguments = inspect.signature(model.base_model.forward).parameters
    found = next((name for name in CACHE_ARGUMENTS if name in arguments), None)
    if found is None or not model.can_generate():
        raise FactorMixError(
            f"task adapter 'prefix': {type(model).__name__} takes no keys and values of earlier tokens, which a prefix "
            "consists of; only decoders take them. Use 'pfeiffer', 'houlsby' or 'lora'."
        )
    return found
