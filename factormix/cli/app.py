"""`factormix COMMAND`: the table of commands, and how an error reaches the user."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import typer
from typer.core import TyperGroup

from factormix.cli.adapt import adapt
from factormix.cli.bench import bench
from factormix.cli.demo import demo
from factormix.cli.eval import evaluate
from factormix.cli.export import export
from factormix.cli.factor import factor
from factormix.cli.generate import generate
from factormix.cli.heal import heal
from factormix.cli.inject import inject
from factormix.cli.inspect import inspect
from factormix.cli.merge import merge
from factormix.cli.predict import predict
from factormix.cli.sample import sample
from factormix.cli.show import show
from factormix.cli.sweep import sweep
from factormix.cli.validate import validate
from factormix.run.errors import FactorMixError

COMMANDS: dict[str, Callable[..., Any]] = {
    "factor": factor,
    "heal": heal,
    "eval": evaluate,
    "sweep": sweep,
    "generate": generate,
    "sample": sample,
    "bench": bench,
    "export": export,
    "inject": inject,
    "merge": merge,
    "adapt": adapt,
    "predict": predict,
    "inspect": inspect,
    "show": show,
    "validate": validate,
    "demo": demo,
}


class _Group(TyperGroup):
    """Prints what a user can put right as one line on stderr, exit code 2; FACTORMIX_TRACEBACK=1 shows where."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (FactorMixError, OSError, torch.OutOfMemoryError) as error:
            message = _message(error)
            if message is None or os.environ.get("FACTORMIX_TRACEBACK") == "1":
                raise
            print(f"error: {message}", file=sys.stderr)
            raise typer.Exit(2) from None


def _message(error: Exception) -> str | None:
    """What to say, or None for an error that is none of the user's."""
    if isinstance(error, FactorMixError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"the device is out of memory ({str(error).splitlines()[0]}) Use fewer --tokens or --dtype bfloat16."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{str(error.filename)!r}: {error.strerror}. Check the path, its permissions and the space on the disk."
    return None


app = typer.Typer(
    cls=_Group,
    name="factormix",
    help="Make a trained transformer's FFNs sparse, inject domain knowledge, and prove what was gained and lost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def main() -> None:
    """The `factormix` console script."""
    warnings.simplefilter("ignore", FutureWarning)  # libraries' notes to their developers, not to those who run them
    app()
