"""Typed configs: one dataclass is the Python argument, the YAML recipe and the command's flags.

Run it::

    @dataclass(frozen=True)
    class HealConfig(Config):
        steps: int = option(200, help="optimiser steps", minimum=1)
        loss: str = option("kl", help="what the student is held to", choices=("kl", "mse"))

    HealConfig(steps=50)                       # Python
    HealConfig.from_yaml("heal.yaml")          # a recipe
    HealConfig.from_dict({"step": 50})         # FactorMixError: ... Did you mean 'steps'?
    describe(HealConfig)                       # what the command line and the docs are made from

Values are coerced to the declared type where nothing is lost (``3`` to ``3.0``, ``"1e-4"`` to ``1e-4``, ``"true"`` to
``True``, a list to a tuple, a string to a Path, a mapping to a nested Config, one value to a list of one) and
refused otherwise, the same way in Python, YAML and flags.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import yaml  # type: ignore[import-untyped, unused-ignore]

from factormix.run.coerce import check, coerce, plain
from factormix.run.errors import FactorMixError, nearest


class Option(NamedTuple):
    """One field of a Config, as the command line and the docs need it. `default` is REQUIRED where there is none."""

    name: str
    type: Any
    default: Any
    help: str
    choices: tuple[Any, ...] | None


REQUIRED = dataclasses.MISSING


def option(
    default: Any = REQUIRED,
    *,
    help: str = "",
    choices: Iterable[Any] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A dataclass field with what a user must know about it.

    Args:
        default: the default; left out, the option is required. Lists, dicts and callables without arguments that
            build a nested Config (its class) are used as factories, so that no two configs share one.
        help: one sentence: what to choose and when.
        choices: the values allowed (for a list: each of its items).
        minimum: the smallest value allowed, itself included.
        maximum: the largest value allowed, itself included.
    """
    metadata = {
        "help": help,
        "choices": None if choices is None else tuple(choices),
        "minimum": minimum,
        "maximum": maximum,
    }
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    if isinstance(default, type) and issubclass(default, Config):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Config:
    """Base of every config; subclasses are dataclasses (frozen or not) whose fields are made with `option`."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = coerce(getattr(self, field.name), hints[field.name], f"{type(self).__name__}.{field.name}")
            object.__setattr__(self, field.name, value)
        self.validate()

    def validate(self) -> None:
        """Check choices and ranges. Override to add rules between fields; call ``super().validate()`` first."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            for item in value if isinstance(value, list | tuple) else [value]:
                check(item, field.metadata, f"{type(self).__name__}.{field.name}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a mapping; unknown keys, missing required keys and wrong types are errors."""
        if not isinstance(values, Mapping):
            raise FactorMixError(f"{cls.__name__} needs a mapping of options, received {values!r}.")
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        _refuse_unknown(cls, values)
        for name, field in fields.items():
            if name not in values and field.default is REQUIRED and field.default_factory is REQUIRED:
                raise FactorMixError(f"{cls.__name__} needs {name!r}: {field.metadata.get('help') or 'no default'}.")
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a YAML recipe; an empty file means all defaults."""
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise FactorMixError(f"cannot read recipe {str(path)!r}: {error.strerror}.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise FactorMixError(f"recipe {str(path)!r} is not YAML: {error}") from error
        try:
            return cls.from_dict({} if values is None else values)
        except FactorMixError as error:
            raise FactorMixError(f"recipe {str(path)!r}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain values (dict, list, str, numbers, None) that `from_dict` turns into an equal config."""
        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    def replace(self, **changes: Any) -> Self:
        """A copy with some options changed, checked like a new one."""
        _refuse_unknown(type(self), changes)
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


def describe(cls: type[Config]) -> list[Option]:
    """Every option of a config, in order: name, type, default, help, choices."""
    hints = typing.get_type_hints(cls)
    described = []
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        default = field.default if field.default_factory is REQUIRED else field.default_factory()
        meta = field.metadata
        described.append(Option(field.name, hints[field.name], default, meta.get("help", ""), meta.get("choices")))
    return described


def _refuse_unknown(cls: type[Config], values: Mapping[str, Any]) -> None:
    allowed = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in allowed:
            raise FactorMixError(
                f"{cls.__name__} has no option {key!r}; its options: {', '.join(allowed)}.{nearest(key, allowed)}"
            )
