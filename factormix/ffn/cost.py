"""Count what the FFNs of a model cost, from its config alone, and bound how much faster sparse FFNs can make it.

    inspection = inspect_model("HuggingFaceTB/SmolLM2-135M")     # reads the config only, no weights
    inspection.speed_limit(0.5).prefill                          # no model with half of its FFN active can beat this

The model is built on the meta device. Two costs are counted, both for one token in one forward pass:

- FLOPs: 2 (multiply and add) for each weight of a Linear or Conv1D, each time a token crosses it. ALBERT's tokens cross
  its shared layers several times. The language-model head counts, embedding look-ups do not. Attention scores and
  element-wise work are not counted. Poolers and classifiers count for every token, although they run once a sequence.
- Parameters read: every parameter that decoding one token at batch size 1 must read. All count alike, so the share of
  parameters equals the share of bytes. The key-value cache is not counted.

For an encoder-decoder, one token in each stack is counted, in both costs. The work that is not counted would lower the
FFN's share, so the speed limit is somewhat too high: it is a bound, not a forecast.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from factormix.ffn.families import FAMILIES
from factormix.ffn.site import FFNSite
from factormix.ffn.surgery import find_sites
from factormix.run.errors import FactorMixError


@dataclass(frozen=True)
class SiteGroup:
    """FFNs that differ only in their layer.

    Attributes:
        stack: "decoder" or "encoder".
        layers: every layer that runs one of them.
        sites: the number of FFNs; an FFN that several layers share counts once.
        use_count: how many times a token crosses each of them.
        hidden, inner: H and I.
        activation: name in transformers' ACT2FN.
        gated: True when a gate multiplies the up projection.
        kind: "module", "split" or "inline" (see `factormix.ffn.families`).
        parameters: weights and biases of ONE of them.
    """

    stack: str
    layers: tuple[int, ...]
    sites: int
    use_count: int
    hidden: int
    inner: int
    activation: str
    gated: bool
    kind: str
    parameters: int


@dataclass(frozen=True)
class SpeedLimit:
    """The largest speed-up that sparse FFNs can give, by Amdahl's law: ``1 / (1 - share * (1 - active_fraction))``.

    Attributes:
        active_fraction: share of the FFN's neurons that run, 0 to 1.
        prefill: speed-up where FLOPs are the limit (long inputs, large batches), 1 or more.
        decode: speed-up where bytes read are the limit (one token at a time, batch size 1), 1 or more.
    """

    active_fraction: float
    prefill: float
    decode: float

    def to_dict(self) -> dict[str, float]:
        """Plain numbers, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect_model`. A parameter that is stored once counts once, even if several layers use it.

    Attributes:
        model_type: the family, as the config names it.
        model_class: the class that was built; whether there is a head depends on it.
        groups: the FFNs from front to back, those that differ only in their layer in one group.
        parameters: all parameters: ffn_parameters + embedding_parameters + other_parameters.
        ffn_parameters: those in FFNs.
        embedding_parameters: those in embedding tables, including a table that is tied to the head.
        other_parameters: those of attention, norms and heads.
        flops_per_token: FLOPs for one token, as the top of this file counts them.
        ffn_flops_per_token: the part of flops_per_token that FFNs take.
        read_parameters: parameters read to decode one token.
        ffn_read_parameters: the part of read_parameters that FFNs take.
    """

    model_type: str
    model_class: str
    groups: tuple[SiteGroup, ...]
    parameters: int
    ffn_parameters: int
    embedding_parameters: int
    other_parameters: int
    flops_per_token: int
    ffn_flops_per_token: int
    read_parameters: int
    ffn_read_parameters: int

    @property
    def parameter_share(self) -> float:
        """FFN share of the parameters, 0 to 1."""
        return self.ffn_parameters / self.parameters

    @property
    def flops_share(self) -> float:
        """FFN share of the FLOPs per token, 0 to 1."""
        return self.ffn_flops_per_token / self.flops_per_token

    @property
    def read_share(self) -> float:
        """FFN share of the parameters read to decode one token, 0 to 1."""
        return self.ffn_read_parameters / self.read_parameters

    def speed_limit(self, active_fraction: float) -> SpeedLimit:
        """The bound on the speed-up if only `active_fraction` of each FFN runs and the router costs nothing.

        Args:
            active_fraction: (S + K) / E of a layout, 0 to 1.

        Raises:
            FactorMixError: `active_fraction` is outside 0 to 1.
        """
        if not 0.0 <= active_fraction <= 1.0:
            raise FactorMixError(
                f"active_fraction {active_fraction!r} is not allowed; it is the share of neurons that run, 0 to 1. "
                "A layout gives (S + K) / E: for S4A4E16 it is 0.5."
            )
        saved = 1.0 - active_fraction
        return SpeedLimit(
            active_fraction=active_fraction,
            prefill=1.0 / (1.0 - self.flops_share * saved),
            decode=1.0 / (1.0 - self.read_share * saved),
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields and the three shares as plain values, ready for JSON."""
        shares = {name: getattr(self, name) for name in ("parameter_share", "flops_share", "read_share")}
        return {**asdict(self), **shares}


def inspect_model(
    source: str | os.PathLike[str] | PreTrainedConfig | PreTrainedModel, *, revision: str | None = None
) -> Inspection:
    """Count what the FFNs of a model cost, without loading weights.

    The model's class is the one named in ``config.architectures``. If the config names none, the base model without a
    head is counted, and `Inspection.model_class` says so.

    Args:
        source: a directory or hub name (only its config is read), a config, or a dense model.
        revision: branch, tag or commit of a hub name.

    Raises:
        FactorMixError: there is no readable config at `source`, or the model's FFNs are unknown (see `find_sites`).
    """
    if isinstance(source, PreTrainedModel):
        return _count(source)
    config = source if isinstance(source, PreTrainedConfig) else _config(source, revision)
    return _count(empty_model(config))


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config on the meta device. It has every shape but no weights."""
    with torch.device("meta"):
        return cast(PreTrainedModel, _model_class(config)(config))


def _config(source: str | os.PathLike[str], revision: str | None) -> PreTrainedConfig:
    try:
        return cast(PreTrainedConfig, AutoConfig.from_pretrained(os.fspath(source), revision=revision))
    except (OSError, ValueError, KeyError) as error:
        raise FactorMixError(
            f"no model config at {os.fspath(source)!r}: {error} Give a directory with a config.json or a hub name."
        ) from error


def _model_class(config: PreTrainedConfig) -> Any:
    """The class that the config names if transformers has it, else the Auto class of base models."""
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    return AutoModel.from_config


def _count(model: PreTrainedModel) -> Inspection:
    sites = find_sites(model)
    aside = FAMILIES[model.config.model_type].aside
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tables = {id(module.weight): module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    embedding = sum(table.numel() for table in tables.values())
    ffn = sum(site.parameters for site in sites)
    matrix = read = 0
    seen: set[int] = set()  # parameters already counted as read; a tied head counts where it multiplies
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or any(tower in name.split(".") for tower in aside):
            continue
        crossings = _crossings(name, sites)
        if isinstance(module, (nn.Linear, Conv1D)):
            matrix += crossings * module.weight.numel()
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                read += crossings * parameter.numel()
    return Inspection(
        model_type=model.config.model_type,
        model_class=type(model).__name__,
        groups=_groups(sites),
        parameters=parameters,
        ffn_parameters=ffn,
        embedding_parameters=embedding,
        other_parameters=parameters - ffn - embedding,
        flops_per_token=2 * matrix,
        ffn_flops_per_token=2 * sum(site.use_count * site.matrix_parameters for site in sites),
        read_parameters=read,
        ffn_read_parameters=sum(site.use_count * site.parameters for site in sites),
    )


def _crossings(name: str, sites: list[FFNSite]) -> int:
    """How many times a token crosses this module. A shared layer runs as a whole, its attention included."""
    return next((site.use_count for site in sites if site.use_count > 1 and f"{name}.".startswith(f"{site.at}.")), 1)


def _groups(sites: list[FFNSite]) -> tuple[SiteGroup, ...]:
    alike: dict[tuple[Any, ...], list[FFNSite]] = {}
    for site in sites:
        key = (site.stack, site.use_count, site.hidden, site.inner, site.activation, site.gated, site.kind)
        alike.setdefault((*key, site.parameters), []).append(site)
    return tuple(
        SiteGroup(
            stack=group[0].stack,
            layers=tuple(sorted(layer for site in group for layer in site.layers)),
            sites=len(group),
            use_count=group[0].use_count,
            hidden=group[0].hidden,
            inner=group[0].inner,
            activation=group[0].activation,
            gated=group[0].gated,
            kind=group[0].kind,
            parameters=group[0].parameters,
        )
        for group in alike.values()
    )
