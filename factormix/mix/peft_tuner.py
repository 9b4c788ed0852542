"""Put MixDA into PEFT's container: a thin BaseTuner over FFN sites, so that PEFT's usual calls work.

    model = get_peft_model(base, MixDAConfig(layers="auto"), adapter_name="pubmed")
    model.load_adapter("reviews", "reviews")
    with model.disable_adapter(): ...             # runs the base, bit for bit
    model = PeftModel.from_pretrained(base, "pubmed")

Trainability is explicit: a new adapter trains unless its config is in inference mode, and only `set_requires_grad`
changes that. PEFT's own layers behave differently: they unfreeze every adapter that `set_adapter` names or that
`disable_adapter` leaves active.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import nn
from transformers import PreTrainedModel

from factormix.ffn import FFNSite, isolate
from factormix.mix.peft_enum import mixda_type
from factormix.mix.sizes import Sizes, adapter_sizes
from factormix.nn import DomainFFN, sites_of
from factormix.run.errors import FactorMixError, choose

PREFIX = "mixda_"


@dataclass
class MixDAConfig(PeftConfig):
    """The content of adapter_config.json.

    `form`, `layers`, `width`, `reduction` and `budget` are those of `InjectConfig`. When the adapter is made, PEFT's
    tuner replaces `layers` by numbers, computes `width`, and fills in `sites` and `target_modules`.

    Attributes:
        form: "ffn", which can be merged into the FFN, or "bottleneck", the paper's form.
        reads: input of the adapter: "input" (the FFN's), or for a bottleneck also "neurons".
        weight: fixed weight of the adapter if no gate weighs it.
        sites: the shapes that a base must have, by site index.
        base_ffns: hash of the weights of the FFNs beside the adapter, see `base_identity`.
        target_modules: paths of the FFNs beside the adapter.

    Raises:
        FactorMixError: when the adapter is made, if `adapter_sizes` refuses the values or the base has other shapes.
    """

    form: str = field(default="ffn", metadata={"help": "ffn (can be merged into the FFN) or bottleneck (the paper's)"})
    reads: str = field(default="input", metadata={"help": "input; a bottleneck can also read neurons"})
    layers: str | list[int] = field(default="auto", metadata={"help": "auto, spread, or layer numbers"})
    width: int | None = field(
        default=None, metadata={"help": "neurons of each adapter; by default reduction or budget sets them"}
    )
    reduction: float | None = field(default=None, metadata={"help": "sets the width to hidden size / reduction"})
    budget: float = field(default=0.004, metadata={"help": "parameters as a share of the model's"})
    weight: float = field(default=1.0, metadata={"help": "fixed weight of the adapter if no gate weighs it"})
    sites: dict[str, dict[str, Any]] | None = field(
        default=None, metadata={"help": "shapes by site; filled in when the adapter is made"}
    )
    base_ffns: str | None = field(
        default=None, metadata={"help": "hash of the FFNs' own weights; filled in when the adapter is saved"}
    )
    target_modules: Sequence[str] | None = field(
        default=None, metadata={"help": "paths of the FFNs; filled in when the adapter is made"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = mixda_type()


class MixDALayer(DomainFFN, BaseTunerLayer):
    """A `DomainFFN` whose adapters PEFT can switch on and off."""

    adapter_layer_names = ("mixda_adapters",)
    other_param_names = ("fixed_weights",)

    def __init__(self, base: nn.Module, site: FFNSite) -> None:
        DomainFFN.__init__(self, base, site)
        self._active_adapter = []
        self.merged_adapters: list[str] = []

    @property
    def active_domains(self) -> list[str]:
        """The adapters that run: those that PEFT has active, that are not disabled, and that exist at this site."""
        if self.disable_adapters:
            return []
        return [name for name in self.active_adapters if name in self.mixda_adapters]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose which adapters run. Unlike in PEFT, this does not change which parameters train."""
        self._active_adapter = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)

    def enable_adapters(self, enabled: bool) -> None:
        """Run the active adapters, or none. Unlike in PEFT, this does not change which parameters train."""
        self._disable_adapters = not enabled

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused, because the FFN becomes wider, which changes the model's config too.

        Raises:
            FactorMixError: always.
        """
        raise FactorMixError(
            "an adapter cannot be merged in place, because the FFN grows. Use `factormix merge`, which writes a new "
            "checkpoint."
        )

    def get_base_layer(self) -> nn.Module:
        """The frozen FFN."""
        return self.base_layer


class MixDAModel(BaseTuner):
    """PEFT's tuner for MixDA. It finds the sites, makes each FFN one module, and puts a `MixDALayer` there."""

    prefix = PREFIX
    tuner_layer_cls = MixDALayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's attribute; our sites come from the model

    @property
    def sites(self) -> list[FFNSite]:
        """All FFNs of the base, found before the first one is wrapped."""
        if "mixda_sites" not in self.__dict__:
            self.mixda_sites = sites_of(cast(PreTrainedModel, self.model))
        return self.mixda_sites

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> MixDAConfig:
        sizes = self._sizes(peft_config)
        specs = {str(index): spec.to_dict() for index, spec in sizes.specs.items()}
        if peft_config.sites is not None and peft_config.sites != specs:
            wanted, found = _first_difference(peft_config.sites, specs)
            raise FactorMixError(
                f"this adapter was made for another model: it needs {wanted}, but here is {found}. Load it on the base "
                f"it was made from ({peft_config.base_model_name_or_path or 'not recorded'})."
            )
        peft_config.layers, peft_config.width = list(sizes.layers), sizes.width
        peft_config.sites, peft_config.reduction = specs, None
        # This is a tuple because PEFT shortens a list of 20 or more names to their common ending, such as "mlp".
        peft_config.target_modules = tuple(site.name for site in sizes.sites)
        return cast(MixDAConfig, peft_config)

    def _sizes(self, config: MixDAConfig) -> Sizes:
        names = ("form", "reads", "layers", "width", "reduction", "budget")
        own = sum(p.numel() for n, p in self.model.named_parameters() if f".{PREFIX}" not in n)
        return adapter_sizes(self.sites, own, **{name: getattr(config, name) for name in names})

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        for site in self.sites:
            if site.name in (peft_config.target_modules or ()):
                isolate(model, site)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return key in (peft_config.target_modules or ())

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        site = next(site for site in self.sites if site.name == current_key)
        layer = target if isinstance(target, MixDALayer) else MixDALayer(target, site)
        sizes = self._sizes(peft_config)
        adapter = layer.fresh(sizes.specs[site.index])
        adapter.requires_grad_(not peft_config.inference_mode).train(target.training)
        layer.add(adapter_name, adapter, peft_config.weight)
        if layer is not target:
            self._replace_module(parent, target_name, layer.train(target.training), target)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Any],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Any]:
        """The tensors of one adapter. A gate at the same site is not part of any adapter."""
        return {name: tensor for name, tensor in state_dict.items() if f".mixda_adapters.{adapter_name}." in name}

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Replace an FFN as a whole. PEFT's own method cannot, because it looks for the weight of a Linear."""
        setattr(parent, child_name, new_module)


def _first_difference(wanted: dict[str, Any], found: dict[str, Any]) -> tuple[str, str]:
    index = next(i for i in [*wanted, *found] if wanted.get(i) != found.get(i))
    return (f"site {index} {wanted.get(index, 'without an adapter')}", f"{found.get(index, 'no such site')}")


def domain_layer(model: nn.Module, site: FFNSite) -> MixDALayer | None:
    """The FFN with domain adapters at a site, or None if the FFN there has none."""
    try:
        layer = model.get_submodule(site.name)
    except AttributeError:  # an FFN that is still spread over its layer
        return None
    return layer if isinstance(layer, MixDALayer) else None


def trainable_names(model: nn.Module) -> set[str]:
    """Names of the parameters that take gradients."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapter_names(model: PeftModel, domains: str | Sequence[str]) -> set[str]:
    """Names of the parameters of these domains' adapters.

    Raises:
        FactorMixError: a domain has no adapter in the model.
    """
    chosen = [domains] if isinstance(domains, str) else domains
    for domain in chosen:
        choose("domain", domain, model.peft_config)
    marks = [f".mixda_adapters.{domain}." for domain in chosen]
    return {name for name, _ in model.named_parameters() if any(mark in name for mark in marks)}


def assert_trainable(model: nn.Module, expected: set[str], when: str) -> None:
    """Check that exactly the expected parameters are trainable.

    Args:
        model: the model.
        expected: names of the parameters that must be trainable.
        when: the time of the check, for the message.

    Raises:
        AssertionError: other parameters are trainable, which is a defect of FactorMix or of PEFT.
    """
    found = trainable_names(model)
    assert found == expected, (
        f"{when}: {sorted(found - expected)[:3]} train but must not, {sorted(expected - found)[:3]} must but do not"
    )


register_peft_method(name=mixda_type().value.lower(), config_cls=MixDAConfig, model_cls=MixDAModel, prefix=PREFIX)
__all__ = [
    "MixDAConfig",
    "MixDALayer",
    "MixDAModel",
    "adapter_names",
    "assert_trainable",
    "domain_layer",
    "trainable_names",
]
