"""Options that several commands share, and the flags that a Config's fields become.

A command lists the common ones it means in its signature: ``dtype: Dtype = "float32"``. The recipe's flags are not
written by hand: ``@config_flags(FactorConfig)`` gives a command one flag a field, with the field's own help, default
and choices, and passes those that were given as one nested dict.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from factormix.run.config import Config, Option, describe
from factormix.run.directory import write_json
from factormix.run.errors import FactorMixError

MODEL_HELP = "a directory (dense or FactorMix), a hub name, asset:NAME such as asset:smollm2, or a .gguf file"
TEXT_HELP = "a .txt or .jsonl file, or asset:NAME such as asset:brown-train; repeat for more"

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Against = Annotated[str | None, typer.Option("--against", metavar="DENSE", help="the dense model it was made from")]
Adapter = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="DIR", help="a domain adapter beside MODEL's FFNs; repeat for more"),
]
Gate = Annotated[
    Path | None,
    typer.Option(
        "--gate",
        metavar="DIR|own",
        help="over the --adapter given, in order: the gate/ of a stage-2 directory; own: that of each adapter",
    ),
]
Mix = Annotated[
    Path | None,
    typer.Option("--mix", metavar="DIR", help="all that `factormix adapt` wrote: adapters, gates, task adapter"),
]
Text = Annotated[list[str] | None, typer.Option("--text", metavar="FILE", help=TEXT_HELP)]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", metavar="YAML", help="options in a file; flags given beside it win")
]
Seed = Annotated[int, typer.Option("--seed", help="of everything random")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps ...")]
DeviceMap = Annotated[
    str | None, typer.Option("--device-map", help="spread the model over devices, for example auto; replaces --device")
]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16, or auto for the checkpoint's own")]
Quantize = Annotated[
    str | None,
    typer.Option("--quantize", metavar="int8", help="int8 weights in the FFNs of MODEL, made as it is loaded; CPU"),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an existing result, once the new one is whole")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="check everything, print the plan, compute nothing")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress and no remarks on stderr")]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="also write the result as JSON (docs/json.md)")
]

FLAG_NAMES = {"heal.max_minutes": "--max-minutes"}  # where the flag is not the field's name


def check_json(path: Path | None) -> None:
    """Refuse a --json that could not be written, before hours of compute."""
    if path is None:
        return
    if path.is_dir():
        raise FactorMixError(f"--json {str(path)!r} is a directory; name a file.")
    if not path.absolute().parent.is_dir():
        raise FactorMixError(
            f"--json {str(path)!r}: there is no directory {str(path.absolute().parent)!r}; make it first."
        )


def put_json(path: Path | None, values: Mapping[str, Any]) -> None:
    """Write the result where --json asked for it."""
    if path is not None:
        write_json(path, values)


def config_flags(config: type[Config]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: the command's parameter ``given: dict[str, Any]`` becomes one flag for each field of `config`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        flags = _flags(config)

        @functools.wraps(command)
        def with_flags(**arguments: Any) -> None:
            given: dict[str, Any] = {}
            for name, flag in flags.items():
                value = arguments.pop(name)
                if value is not None and value != []:
                    place = given
                    for key in flag.path[:-1]:
                        place = place.setdefault(key, {})
                    place[flag.path[-1]] = flag.read(value)
            command(given=given, **arguments)

        own = inspect.signature(command, eval_str=True)
        parameters = [p for p in own.parameters.values() if p.name != "given"]
        made = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=flag.annotation)
            for name, flag in flags.items()
        ]
        keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        with_flags.__signature__ = own.replace(parameters=[*keyword, *made])  # type: ignore[attr-defined]
        with_flags.__annotations__ = {p.name: p.annotation for p in [*keyword, *made]}
        return with_flags

    return decorate


class _Flag(typing.NamedTuple):
    path: tuple[str, ...]  # keys in the nested dict
    annotation: Any
    read: Callable[[Any], Any] = lambda value: value  # from what was typed


def _flags(config: type[Config], prefix: tuple[str, ...] = ()) -> dict[str, _Flag]:
    """One flag a field by parameter name; fields of a nested config get its name in front."""
    found: dict[str, _Flag] = {}
    for field in describe(config):
        path = (*prefix, field.name)
        if isinstance(field.type, type) and issubclass(field.type, Config):
            found |= _flags(field.type, path)
        else:
            found["_".join(path)] = _flag(field, path)
    return found


def _flag(field: Option, path: tuple[str, ...]) -> _Flag:
    kind, dashed = _plain_type(field.type), "-".join(path).replace("_", "-")
    name = FLAG_NAMES.get(".".join(path), f"--{dashed}")
    if kind == list[int]:
        option = typer.Option(name, help=f"{field.help}; for example 0,1,2", metavar="N,N...")
        return _Flag(path, Annotated[list[str] | None, option], functools.partial(_whole_numbers, name))
    if kind is bool:
        name = f"{name}/--no-{dashed}"
    option = typer.Option(
        name,
        help=f"{field.help} [{field.default}]" if field.default is not None else field.help,
        metavar=None if field.choices is None else "|".join(map(str, field.choices)),
        show_default=False,
    )
    return _Flag(path, Annotated[kind | None, option])


def _whole_numbers(name: str, typed: list[str]) -> list[int]:
    """What a flag for whole numbers was given: with commas between them, and repeated if one likes."""
    numbers = ",".join(typed).split(",")
    try:
        return [int(number) for number in numbers]
    except ValueError:
        raise FactorMixError(f"{name} {','.join(typed)!r} is not a list of whole numbers; write it as 0,1,2.") from None


def _plain_type(hint: Any) -> Any:
    """A field's type without its None."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(member for member in typing.get_args(hint) if member is not type(None))
    return hint


def aligned(rows: typing.Sequence[typing.Sequence[str]]) -> list[str]:
    """Lines of a table for the terminal: columns as wide as their widest cell, words left, numbers right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = [any(row[i][:1].isdigit() for row in rows[1:]) for i in range(len(rows[0]))]
    return [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in rows
    ]
