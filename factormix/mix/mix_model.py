"""MixModel: a frozen backbone with frozen domain adapters, and the parts that stage 2 trains (MixDA, section 3.3).

    gates over the domains at every adapted FFN  +  a task adapter  +  a head  =  `trained`, and nothing else

An explicit set of names says which parameters train. The model is checked against this set before and after training,
enabling, disabling, loading and generating, because PEFT is known to change trainability there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from factormix.ffn import FFNSite
from factormix.mix.adapter_files import load_adapters
from factormix.mix.gated import OWN, fill_own_gates, put_gates
from factormix.mix.losses import no_cache
from factormix.mix.peft_task_adapters import LoraAdapter, PrefixAdapter
from factormix.mix.peft_tuner import assert_trainable, domain_layer, trainable_names
from factormix.mix.task_adapters import BottleneckAdapters, TaskAdapter, TaskAdapterSpec
from factormix.mix.trained import hold_only_trained
from factormix.nn import DomainGate, sites_of
from factormix.run.errors import FactorMixError, choose

HEAD_STD = 0.02  # standard deviation of the head's weight at the start


class TaskHead(nn.Module):
    """A linear head that reads one pooled state per sequence, in float32: (N, H) -> (N, outputs)."""

    def __init__(self, hidden: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(HEAD_STD * torch.randn(outputs, hidden))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, pooled: Tensor) -> Tensor:
        """pooled (N, H) -> (N, outputs)."""
        with torch.autocast(pooled.device.type, enabled=False):
            return nn.functional.linear(pooled.float().to(self.weight.device), self.weight, self.bias)


class MixModel(nn.Module):
    """Backbone, domains, gates, task adapter and head; see the module's text.

    Its ``state_dict`` holds only the parameters that train, by the names in `trained`.

    Args:
        model: the base, dense or FactorMix, changed in place.
        domains: adapter directories by name, in the order of the gates' weights. It is empty for a baseline without
            domains.
        adapter: kind and sizes of the task adapter.
        outputs: outputs of the head. 0 makes no head, and the model's own language-modelling head answers.
        pooling: state that the head reads, a key of `POOLINGS`.
        gate: kind of the gates, see `DomainGate`.
        start: start of the gates, see `DomainGate`. "own" takes each adapter's own gate.

    Attributes:
        model: the base with all parts in it.
        domains: names of the domains, in order.
        layers: the FFNs with domain adapters, by site index.
        task_adapter: the task adapter.
        head: the head, or None for language tasks.
        mask: attention mask (N, L) of the last forward, so that readers of the gates' weights can leave out padding.
        trained: names of the parameters that train.

    Raises:
        FactorMixError: the model is an encoder-decoder, the pooling is unknown, there is nothing to train, or
            `load_adapters`, `fill_own_gates` or `make_task_adapter` refuses.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        domains: Mapping[str, str | Path],
        adapter: TaskAdapterSpec,
        outputs: int,
        pooling: str = "last",
        gate: str = "sigmoid",
        start: str = "on",
    ) -> None:
        super().__init__()
        if model.config.is_encoder_decoder:
            raise FactorMixError(
                f"{type(model).__name__} is an encoder-decoder; stage 2 needs one stack, a decoder or an encoder."
            )
        if outputs:
            choose("pooling", pooling, POOLINGS)
        sites = sites_of(model)
        self.model, self.domains, self.pooling = model, list(domains), pooling
        self.config, self.mask = model.config, torch.ones(0, 0)
        if hasattr(model, "hf_device_map"):  # this tells a Trainer not to move a model that is spread over devices
            self.hf_device_map = model.hf_device_map
        peft = load_adapters(model, domains) if domains else None
        self.__dict__["peft"] = peft  # not registered, because it contains the same model
        gates = put_gates(model, sites, self.domains, gate, "on" if start == OWN else start)
        if start == OWN:
            fill_own_gates(gates, domains)
        layers = {site.index: domain_layer(model, site) for site in sites}
        self.layers = {index: layer for index, layer in layers.items() if layer is not None}
        self.task_adapter = make_task_adapter(adapter, model, sites)
        device = model.device
        hidden = sites[0].hidden
        self.head = TaskHead(hidden, outputs).to(device) if outputs else None
        chosen = {id(p) for layer in self.layers.values() for p in cast(DomainGate, layer.gate).parameters()}
        chosen |= {id(p) for p in self.task_adapter.trained()}
        chosen |= {id(p) for p in (self.head.parameters() if self.head is not None else ())}
        self.trained = frozenset(name for name, p in self.named_parameters() if id(p) in chosen)
        if not self.trained:
            raise FactorMixError(
                "nothing to train, because there is no domain, no task adapter and no head. Name a domain with "
                "--domains."
            )
        hold_only_trained(self)
        self.set_trainable(False)
        self.eval()

    @property
    def device(self) -> torch.device:
        """The base's device."""
        return self.model.device

    @property
    def gates(self) -> dict[int, DomainGate]:
        """The gates by site index."""
        return {index: cast(DomainGate, layer.gate) for index, layer in self.layers.items()}

    def set_trainable(self, on: bool) -> None:
        """Make exactly the parameters in `trained` trainable, or none if `on` is False."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(on and name in self.trained)

    def assert_trainable(self, on: bool, when: str) -> None:
        """Check that exactly the parameters in `trained` are trainable, or none if `on` is False.

        Raises:
            AssertionError: other parameters are trainable, which is a defect of FactorMix or of PEFT.
        """
        assert_trainable(self, set(self.trained) if on else set(), when)

    @contextmanager
    def disabled(self) -> Iterator[PreTrainedModel]:
        """Switch off domain adapters, gates and task adapter. The base then runs alone, bit for bit as before."""
        before = trainable_names(self)
        self._enable(False, before)
        try:
            yield self.model
        finally:
            self._enable(True, before)

    def _enable(self, on: bool, trainable: set[str]) -> None:
        for layer in self.layers.values():
            layer.enable_adapters(on)
        self.task_adapter.enable(on)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in trainable)
        assert_trainable(self, trainable, "after enable" if on else "after disable")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The head's outputs (N, outputs), or without a head the model's logits (N, L, vocabulary), both float32.

        Args:
            input_ids, attention_mask: (N, L) int64. With a head, padding may be anywhere and changes only rounding.
                Without a head it must be on the right, because positions are counted from the start of the row.
        """
        if self.head is not None:
            return cast(Tensor, self.head(self.pooled(input_ids, attention_mask)))
        self.mask = attention_mask
        logits = self.model(input_ids=input_ids, **self._around(input_ids, attention_mask)).logits
        return cast(Tensor, logits.float())  # (N, L, V)

    def pooled(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The state of each sequence that the head reads: input_ids, attention_mask (N, L) -> (N, H)."""
        order = attention_mask.argsort(dim=1, descending=True, stable=True)  # (N, L): text first, padding behind
        ids, mask = input_ids.gather(1, order), attention_mask.gather(1, order)  # (N, L)
        self.mask = mask
        backbone = self.model.base_model
        states = backbone(input_ids=ids, **self._around(ids, mask)).last_hidden_state  # (N, L, H)
        return POOLINGS[self.pooling](states, mask.to(states.device))  # (N, H)

    def _around(self, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        """The model's arguments beside the ids: the mask, the prefix if there is one, and use_cache=False."""
        prefix = self.task_adapter.prefix(len(ids))
        uncached = no_cache(self.model)
        if not prefix:
            return {"attention_mask": mask, **uncached}
        seen = mask.new_ones(len(ids), self.task_adapter.spec.tokens)  # (N, P)
        return {"attention_mask": torch.cat([seen, mask], dim=1), **prefix, **uncached}

    @torch.inference_mode()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
        """Generate with domains, gates and task adapter, one sequence for each prompt.

        Args:
            input_ids, attention_mask: (N, L) int64, padded on the left.
            kwargs: other arguments of transformers' generate.

        Returns:
            (N, L + new) int64, the prompts and the new tokens.

        Raises:
            FactorMixError: the model does not generate.
        """
        if not self.model.can_generate():
            raise FactorMixError(f"{type(self.model).__name__} does not generate text; allowed: decoders.")
        before = trainable_names(self)
        prefix = self.task_adapter.prefix(len(input_ids))
        count = self.task_adapter.spec.tokens if prefix else 0
        # generate() skips as many ids as its cache holds, so ids are added for the prefix. PEFT 0.21's own generate is
        # not used, because it gives other tokens than forward does (seen with transformers 5.24).
        ids = torch.cat([input_ids[:, :1].expand(-1, count), input_ids], dim=1)  # (N, P + L)
        mask = torch.cat([attention_mask.new_ones(len(ids), count), attention_mask], dim=1)  # (N, P + L)
        generate: Any = self.model.generate
        out = generate(input_ids=ids, attention_mask=mask, **prefix, **kwargs)  # (N, P + L + new)
        assert_trainable(self, before, "after generate")
        return cast(Tensor, out[:, count:])

    def trained_tensors(self) -> dict[str, Tensor]:
        """Copies of the parameters that train, on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.named_parameters() if name in self.trained}

    @torch.no_grad()
    def fill_trained(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the copies of `trained_tensors` back."""
        named = dict(self.named_parameters())
        assert tensors.keys() == self.trained
        for name, tensor in tensors.items():
            named[name].copy_(tensor)

    @property
    def peft(self) -> PeftModel | None:
        """The same model in PEFT's wrapper, or None without domains."""
        return cast("PeftModel | None", self.__dict__["peft"])


def _last(states: Tensor, mask: Tensor) -> Tensor:
    """States (N, L, H) and mask (N, L), padded on the right -> the last token's state (N, H)."""
    return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    """States (N, L, H) and mask (N, L) -> the mean over tokens that are not padding (N, H) float32."""
    weights = mask.unsqueeze(-1).float()  # (N, L, 1)
    return (states.float() * weights).sum(1) / weights.sum(1)


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "first": lambda states, mask: states[:, 0],
    "last": _last,
    "mean": _mean,
}
"""How the states of a sequence become the one that the head reads: (states (N, L, H), mask (N, L)) -> (N, H)."""

TASK_ADAPTERS: dict[str, Callable[[TaskAdapterSpec, PreTrainedModel, Sequence[FFNSite]], TaskAdapter]] = {
    "pfeiffer": BottleneckAdapters,
    "houlsby": BottleneckAdapters,
    "lora": LoraAdapter,
    "prefix": lambda spec, model, sites: PrefixAdapter(spec, model),
    "none": lambda spec, model, sites: TaskAdapter(spec),
}
"""How a task adapter of each kind is made; the kinds are those of `adapt_config.TASK_ADAPTERS`."""


def make_task_adapter(spec: TaskAdapterSpec, model: PreTrainedModel, sites: Sequence[FFNSite]) -> TaskAdapter:
    """Make a fresh task adapter in a model that already has its domain adapters.

    Args:
        spec: kind and sizes.
        model: changed in place. Its output stays unchanged, except under a prefix, which starts at random.
        sites: the model's FFNs, found before adapters were put beside them.

    Raises:
        FactorMixError: the kind is unknown, or it does not fit the model's family.
    """
    return TASK_ADAPTERS[choose("task adapter", spec.kind, TASK_ADAPTERS)](spec, model, sites)
