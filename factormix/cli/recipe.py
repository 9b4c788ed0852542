"""A recipe: all that a run of `factor`, `heal`, `inject` or `adapt` depends on, read from YAML, flags beside it.

model: asset:smollm2          # optional: model, out, text, heal_text, preset
preset: default
layout: S4A4E16               # the keys of FactorConfig, nested as in Python
tokens: 16384
heal: {tokens: 120000}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml  # type: ignore[import-untyped, unused-ignore]

from factormix.factor.config import PRESETS, FactorConfig, HealConfig
from factormix.mix.adapt_config import AdaptConfig
from factormix.mix.config import InjectConfig
from factormix.run.config import Config, describe, option
from factormix.run.errors import FactorMixError, nearest


class _Recipe(Config):
    """What all recipes share: the command's own keys, and those of its config at the same level."""

    config: Config

    @classmethod
    def config_class(cls) -> type[Config]:
        """The class of `config`."""
        return next(each.type for each in describe(cls) if each.name == "config")

    @classmethod
    def keys(cls) -> set[str]:
        """All that such a recipe may hold."""
        own = {each.name for each in describe(cls)} - {"config"}
        return own | {each.name for each in describe(cls.config_class())}

    @classmethod
    def split(cls, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The command's own keys, and the config's.

        Raises:
            FactorMixError: an unknown key, with the nearest.
        """
        keys = sorted(cls.keys())
        for key in values:
            if key not in keys:
                raise FactorMixError(f"a recipe has no key {key!r}; its keys: {', '.join(keys)}.{nearest(key, keys)}")
        known = {each.name for each in describe(cls.config_class())}
        return {k: v for k, v in values.items() if k not in known}, {k: v for k, v in values.items() if k in known}

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> Self:
        """From a recipe's flat mapping.

        Raises:
            FactorMixError: an unknown key (with the nearest), a value that cannot be.
        """
        own, options = cls.split(values)
        return cls.from_dict({**own, "config": cls.config_class().from_dict(options)})

    @classmethod
    def open(cls, path: Path | None, flags: Mapping[str, Any]) -> Self:
        """From a YAML file, where there is one, and flags, which win."""
        if path is None:
            return cls.build(flags)
        try:
            return cls.build(merged(read_yaml(path), flags))
        except FactorMixError as error:
            raise FactorMixError(f"recipe {str(path)!r}: {error}") from error

    def flat(self) -> dict[str, Any]:
        """The resolved recipe: a mapping that `build` turns into an equal one. Keys without a value are left out."""
        own = {key: value for key, value in self.to_dict().items() if key not in ("config", "preset") and value}
        return {**own, **self.config.to_dict()}


@dataclass(frozen=True)
class Recipe(_Recipe):
    """What is factored with what into what; `config` is how."""

    model: str | None = option(None, help="the dense model")
    out: str | None = option(None, help="the directory to write")
    text: list[str] = option([], help="calibration text")
    task: str | None = option(None, help="a task's examples, with their answers, as calibration and healing text")
    keep_experts_for: str | None = option(
        None, help="a task's text: `model` is factored, and becomes static with the experts that serve it"
    )
    against: str | None = option(
        None, help="with keep_experts_for: the dense model that `model` was made from, the teacher"
    )
    heal_text: list[str] = option([], help="text for healing; the calibration text by default")
    preset: str = option("default", help="what the options left open are", choices=tuple(PRESETS))
    config: FactorConfig = option(FactorConfig, help="the other keys of a recipe, at its top level")

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> Self:
        """As `_Recipe.build`; a preset fills what is left open, and changes `layout` as it must."""
        own, options = cls.split(values)
        recipe = cls(**own)
        layout = options.pop("layout", None)
        base = FactorConfig.preset(recipe.preset, layout)
        return recipe.replace(config=FactorConfig.from_dict(merged(base.to_dict(), options)))


@dataclass(frozen=True)
class HealRecipe(_Recipe):
    """Which sparse model is healed by which dense one; `config` is how."""

    model: str | None = option(None, help="the sparse model")
    against: str | None = option(None, help="the dense model that it was made from: the teacher")
    out: str | None = option(None, help="the directory to write")
    text: list[str] = option([], help="text to train on")
    window: int = option(512, help="tokens of a window", minimum=8)
    seed: int = option(0, help="of text and training order")
    config: HealConfig = option(HealConfig, help="the other keys of a recipe, at its top level")


@dataclass(frozen=True)
class InjectRecipe(_Recipe):
    """Which knowledge is injected into which model; `config` is how."""

    model: str | None = option(None, help="the base model, dense or FactorMix")
    domain: str | None = option(None, help="the adapter's name")
    out: str | None = option(None, help="the adapter directory to write")
    knowledge: list[str] = option([], help="text or facts of the domain")
    retain: list[str] = option([], help="general text")
    config: InjectConfig = option(InjectConfig, help="the other keys of a recipe, at its top level")


@dataclass(frozen=True)
class AdaptRecipe(_Recipe):
    """Which task is learned above which domains; `config` is how."""

    model: str | None = option(None, help="the base model that the adapters were made from")
    domains: list[str] = option([], help="adapter directories, in the order of the gates' weights")
    task: str | None = option(None, help="labelled text, prompts with targets, or plain text")
    dev: str | None = option(None, help="the best checkpoint is chosen on it")
    test: str | None = option(None, help="scored once, at the end")
    out: str | None = option(None, help="the directory to write")
    config: AdaptConfig = option(AdaptConfig, help="the other keys of a recipe, at its top level")


AnyRecipe = Recipe | HealRecipe | InjectRecipe | AdaptRecipe


def open_any(path: Path) -> tuple[str, AnyRecipe]:
    """A recipe of any command, and which command it is for: its own keys tell.

    Raises:
        FactorMixError: no YAML, an unknown key, a value that cannot be.
    """
    try:
        keys = read_yaml(path).keys()
    except FactorMixError as error:
        raise FactorMixError(f"recipe {str(path)!r}: {error}") from error
    if keys & {"domain", "knowledge", "retain"}:
        return "inject", InjectRecipe.open(path, {})
    if "against" in keys and "keep_experts_for" not in keys:
        return "heal", HealRecipe.open(path, {})
    if keys & {"domains", "task"} and not keys & (Recipe.keys() - AdaptRecipe.keys()):  # factor has a `task` too
        return "adapt", AdaptRecipe.open(path, {})
    return "factor", Recipe.open(path, {})


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, mapping by mapping."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merged(out[key], value) if both else value
    return out


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping at the top of a YAML file; empty for an empty file.

    Raises:
        FactorMixError: it cannot be read, or is something else.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FactorMixError(f"cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FactorMixError(f"is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise FactorMixError(f"needs a mapping of options at its top, received {values!r}.")
    return dict(values)
