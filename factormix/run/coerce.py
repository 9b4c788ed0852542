"""Type and range checks behind `Config`: what a declared type accepts, and the error for what it does not."""

from __future__ import annotations

import math
import numbers
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from factormix.run.errors import FactorMixError, nearest


def coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the declared type `hint`, or FactorMixError naming `where` the value was; loses nothing."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(value, args, where)
    if origin is typing.Literal:
        check(value, {"choices": args}, where)
        return value
    if origin in (list, tuple):
        items = value if isinstance(value, list | tuple) else [value]
        if origin is tuple and args[-1] is not Ellipsis and len(items) != len(args):
            raise FactorMixError(f"{where} received {value!r} and needs {len(args)} values.")
        hints = args if origin is tuple and args[-1] is not Ellipsis else args[:1] * len(items)
        return origin(coerce(item, each, f"{where}[{i}]") for i, (item, each) in enumerate(zip(items, hints)))
    if origin is dict and isinstance(value, Mapping):
        return {coerce(k, args[0], where): coerce(v, args[1], f"{where}[{k!r}]") for k, v in value.items()}
    kind = origin or hint
    if isinstance(value, kind) and not (isinstance(value, bool) and kind in (int, float)):
        return value
    if hasattr(kind, "from_dict") and isinstance(value, Mapping):  # a nested Config
        return kind.from_dict(value)
    coerced = _coerce_scalar(value, kind)
    if coerced is None:
        raise FactorMixError(f"{where} received {value!r} ({type(value).__name__}) and needs {_type_name(hint)}.")
    return coerced


def _coerce_union(value: Any, members: tuple[Any, ...], where: str) -> Any:
    """An exact member first (so that ``int | str`` keeps "3" a string), then the first member that takes the value."""
    if value is None and type(None) in members:
        return None
    plain = [member for member in members if member is not type(None)]
    for member in plain:
        if typing.get_origin(member) is None and type(value) is member:
            return value
    for member in plain[:-1]:
        try:
            return coerce(value, member, where)
        except FactorMixError:
            continue
    return coerce(value, plain[-1], where)


def _coerce_scalar(value: Any, kind: type) -> Any:
    """The value as `kind`, or None where that would lose something."""
    try:
        if kind is bool and isinstance(value, str):
            return {"true": True, "false": False}.get(value.lower())
        if kind is int and isinstance(value, str):
            return int(value)
        if kind is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):  # numpy's
            return int(value)
        if kind is int and isinstance(value, float) and value.is_integer():  # YAML's 1e6 may arrive as 1000000.0
            return int(value)
        if kind is float and isinstance(value, numbers.Real | str) and not isinstance(value, bool):
            return float(value)
        if kind is Path and isinstance(value, str):
            return Path(value)
        if kind is str and isinstance(value, Path):
            return str(value)
    except (ValueError, OverflowError):
        return None
    return None


def check(value: Any, rules: Mapping[str, Any], where: str) -> None:
    """Raise FactorMixError unless `value` is one of `choices` and between `minimum` and `maximum`; None passes."""
    choices, low, high = rules.get("choices"), rules.get("minimum"), rules.get("maximum")
    if value is None:
        return
    if choices is not None and value not in choices:
        listed = ", ".join(map(repr, choices))
        raise FactorMixError(f"{where} received {value!r}; allowed: {listed}.{nearest(value, choices)}")
    if low is None and high is None:
        return
    if math.isnan(value) or (low is not None and value < low) or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"at most {high}" if low is None else f"from {low} to {high}"
        raise FactorMixError(f"{where} received {value!r}; allowed: {allowed}.")


def plain(value: Any) -> Any:
    """`value` as what JSON and YAML hold: configs to dicts, tuples to lists, paths to strings."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
