"""`factormix validate`: check a recipe and show what it means, before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml  # type: ignore[import-untyped, unused-ignore]

from factormix.cli import options
from factormix.cli.inspect import dense_config
from factormix.cli.models import locate, read_config
from factormix.cli.plan import describe_layout
from factormix.cli.recipe import Recipe
from factormix.factor.advice import export_advice
from factormix.ffn.cost import inspect_model
from factormix.run.progress import say

SCHEMA_VERSION = 1


def validate(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="a YAML file")],
    model: Annotated[
        str | None, typer.Option("--model", help="check the layout against this model rather than the recipe's")
    ] = None,
    quiet: options.Quiet = False,
    json: options.Json = None,
) -> None:
    """Print RECIPE with everything it leaves open filled in and, where it names a model, the layout's arithmetic."""
    options.check_json(json)
    resolved = Recipe.open(recipe, {})
    name = model or resolved.model
    lines = [yaml.safe_dump(resolved.flat(), sort_keys=False, allow_unicode=True).rstrip()]
    if name is not None:
        found = inspect_model(dense_config(read_config(locate(name, quiet))))
        lines += ["", *(f"# {line}" for line in describe_layout(found, resolved.config))]  # stdout stays a recipe
        advice = export_advice(resolved.config.cut, (group.inner for group in found.groups))
        if advice:
            say(f"note: {advice}", quiet)
    options.put_json(json, {"schema_version": SCHEMA_VERSION, "recipe": resolved.flat()})
    typer.echo("\n".join(lines))
