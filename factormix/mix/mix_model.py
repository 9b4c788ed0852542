"""MixModel: a frozen backbone with frozen domain adapters, and what stage 2 trains above them (MixDA, section 3.3).

    gates over the domains at every adapted FFN  +  a task adapter  +  a head  =  `trained`, and nothing else

Which parameters train is an explicit set of names. It is held against the model before and after everything that PEFT
is known to change it by: train, enable, disable, load, generate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from factormix.mix.task_adapters import ACTIVATION, BottleneckAdapters, TaskAdapter, TaskAdapterSpec
from factormix.mix.trained import hold_only_trained
from factormix.nn import DomainGate, sites_of
from factormix.run.errors import FactorMixError

HEAD_STD = 0.02  # of the head's weight at the start


class TaskHead(nn.Module):
    """A linear head over one pooled state a sequence, float32: (N, H) -> (N, outputs)."""

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

    A checkpoint of it (``state_dict``) holds what trains, by the names in `trained`.

    Args:
        model: the base, dense or FactorMix, changed in place.
        domains: adapter directories by name, in the order of the gates' weights; none for a baseline without domains.
        adapter: the task adapter.
        outputs: of the head; 0 for none, then the model's own language-modelling head answers.
        pooling: token the head reads, "last", "mean" or "first".
        gate, start: kind and start of the gates, see `DomainGate`; start "own": each domain's own.

    Attributes:
        model: the base with everything in it.
        domains: the names, in order.
        layers: the FFNs with domain adapters, by site index.
        task_adapter, head: what was asked for; head is None for language tasks.
        mask: of the last forward, (N, L); what reads the gates' weights leaves padding out by it.

    Raises:
        FactorMixError: an encoder-decoder; as `load_adapters`, `fill_own_gates` and `make_task_adapter`.
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
        sites = sites_of(model)
        self.model, self.domains, self.pooling = model, list(domains), pooling
        self.config, self.mask = model.config, torch.ones(0, 0)
        if hasattr(model, "hf_device_map"):  # a Trainer leaves a model where it is spread over devices
            self.hf_device_map = model.hf_device_map
        peft = load_adapters(model, domains) if domains else None
        self.__dict__["peft"] = peft  # not registered: it holds the same model
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
                "nothing to train: no domain, no task adapter and no head. Name a domain with --domains."
            )
        hold_only_trained(self)
        self.set_trainable(False)
        self.eval()

    @property
    def device(self) -> torch.device:
        """Of the base."""
        return self.model.device

    @property
    def gates(self) -> dict[int, DomainGate]:
        """By site index."""
        return {index: cast(DomainGate, layer.gate) for index, layer in self.layers.items()}

    def set_trainable(self, on: bool) -> None:
        """Let exactly `trained` take gradients, or nothing."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(on and name in self.trained)

    def assert_trainable(self, on: bool, when: str) -> None:
        """Hold what trains against `trained` (on) or nothing.

        Raises:
            AssertionError: they differ; a defect of ours or of PEFT's.
        """
        assert_trainable(self, set(self.trained) if on else set(), when)

    @contextmanager
    def disabled(self) -> Iterator[PreTrainedModel]:
        """The base alone, bit for bit: no domain adapter, gate or task adapter. Afterwards everything as before."""
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
        """input_ids, attention_mask (N, L) -> the head's (N, outputs), or without a head (N, L, vocabulary); float32.

        With a head, padding may be anywhere and changes nothing but rounding. Without, it stands on the right:
        positions are counted from the start of the row.
        """
        if self.head is not None:
            return cast(Tensor, self.head(self.pooled(input_ids, attention_mask)))
        self.mask = attention_mask
        logits = self.model(input_ids=input_ids, **self._around(input_ids, attention_mask)).logits
        return cast(Tensor, logits.float())  # (N, L, V)

    def pooled(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """One state a sequence: input_ids, attention_mask (N, L) -> (N, H)."""
        order = attention_mask.argsort(dim=1, descending=True, stable=True)  # (N, L): text first, padding behind
        ids, mask = input_ids.gather(1, order), attention_mask.gather(1, order)  # (N, L)
        self.mask = mask
        backbone = self.model.base_model
        states = backbone(input_ids=ids, **self._around(ids, mask)).last_hidden_state  # (N, L, H)
        mask = mask.to(states.device)
        if self.pooling == "first":
            return cast(Tensor, states[:, 0])
        if self.pooling == "last":
            last = mask.sum(1) - 1  # (N,)
            return cast(Tensor, states[torch.arange(len(ids), device=states.device), last])
        weights = mask.unsqueeze(-1).float()  # (N, L, 1)
        return (states.float() * weights).sum(1) / weights.sum(1)  # (N, H)

    def _around(self, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        """What goes with the ids: the mask, a prefix where there is one, and no keys and values kept."""
        prefix = self.task_adapter.prefix(len(ids))
        uncached = no_cache(self.model)
        if not prefix:
            return {"attention_mask": mask, **uncached}
        seen = mask.new_ones(len(ids), self.task_adapter.spec.tokens)  # (N, P)
        return {"attention_mask": torch.cat([seen, mask], dim=1), **prefix, **uncached}

    @torch.inference_mode()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
        """transformers' generate with domains, gates and task adapter; one sequence for each prompt.

        Args:
            input_ids, attention_mask: (N, L), padded on the left.
            kwargs: its other arguments.

        Returns:
            (N, L + new), prompts first.

        Raises:
            FactorMixError: a model that does not generate.
        """
        if not self.model.can_generate():
            raise FactorMixError(f"{type(self.model).__name__} does not generate text; only decoders do.")
        before = trainable_names(self)
        prefix = self.task_adapter.prefix(len(input_ids))
        count = self.task_adapter.spec.tokens if prefix else 0
        # generate() passes over as many ids as its cache holds, so the prefix needs ids that stand for it. Generate of
        # PEFT 0.21 gives other tokens than forward does (seen with transformers 5.24).
        ids = torch.cat([input_ids[:, :1].expand(-1, count), input_ids], dim=1)  # (N, P + L)
        mask = torch.cat([attention_mask.new_ones(len(ids), count), attention_mask], dim=1)  # (N, P + L)
        generate: Any = self.model.generate
        out = generate(input_ids=ids, attention_mask=mask, **prefix, **kwargs)  # (N, P + L + new)
        assert_trainable(self, before, "after generate")
        return cast(Tensor, out[:, count:])

    def trained_tensors(self) -> dict[str, Tensor]:
        """Copies of what trains, on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.named_parameters() if name in self.trained}

    @torch.no_grad()
    def fill_trained(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `trained_tensors` back."""
        named = dict(self.named_parameters())
        assert tensors.keys() == self.trained
        for name, tensor in tensors.items():
            named[name].copy_(tensor)

    @property
    def peft(self) -> PeftModel | None:
        """The same model in PEFT's wrapper, None without domains."""
        return cast("PeftModel | None", self.__dict__["peft"])


def make_task_adapter(spec: TaskAdapterSpec, model: PreTrainedModel, sites: Sequence[FFNSite]) -> TaskAdapter:
    """A fresh task adapter in a model whose domain adapters stand already.

    Args:
        spec: which, and how large.
        model: changed in place; its output stays what it was (but for a prefix, which starts at random).
        sites: the model's FFNs, found before anything was put beside them.

    Raises:
        FactorMixError: a family where this kind has no place, with the reason.
    """
    if spec.kind == "none":
        return TaskAdapter(spec)
    if spec.kind in ACTIVATION:
        return BottleneckAdapters(spec, model, sites)
    return LoraAdapter(spec, model, sites) if spec.kind == "lora" else PrefixAdapter(spec, model)
