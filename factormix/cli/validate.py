"""`factormix validate`: check a recipe of any command and show what it means, before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml  # type: ignore[import-untyped, unused-ignore]

from factormix.cli import options
from factormix.cli.inspect import dense_config
from factormix.cli.models import by_name, empty, locate, read_config
from factormix.cli.plan import describe_healing, describe_keep, describe_layout
from factormix.cli.recipe import AnyRecipe, HealRecipe, InjectRecipe, Recipe, open_any
from factormix.factor.advice import export_advice
from factormix.ffn.cost import inspect_model
from factormix.run.progress import say

SCHEMA_VERSION = 1


def validate(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="a YAML file for factor, heal, inject or adapt")],
    model: Annotated[
        str | None, typer.Option("--model", help="check the recipe against this model rather than its own")
    ] = None,
    quiet: options.Quiet = False,
    json: options.Json = None,
) -> None:
    """Print RECIPE with everything it leaves open filled in and, where it names a model, what it comes to there.

    Its keys tell which command it is for: inject has `domain`, `knowledge` and `retain`, adapt `task`, heal `against`.
    """
    options.check_json(json)
    command, resolved = open_any(recipe)
    name = model or resolved.model
    lines = [yaml.safe_dump(resolved.flat(), sort_keys=False, allow_unicode=True).rstrip()]
    lines += ["", f"# for factormix {command}"]  # stdout stays a recipe
    if name is not None:
        lines += [f"# {line}" for line in _meaning(resolved, name, quiet)]
    options.put_json(json, {"schema_version": SCHEMA_VERSION, "command": command, "recipe": resolved.flat()})
    typer.echo("\n".join(lines))


def _meaning(recipe: AnyRecipe, name: str, quiet: bool) -> list[str]:
    """What a recipe comes to on a model; nothing of the model but its config is read."""
    source = locate(name, quiet)
    if isinstance(recipe, Recipe):
        if recipe.keep_experts_for:
            return describe_keep(read_config(source), recipe.config)
        found = inspect_model(dense_config(read_config(source)))
        advice = export_advice(recipe.config.cut, (group.inner for group in found.groups))
        if advice:
            say(f"note: {advice}", quiet)
        return describe_layout(found, recipe.config)
    if isinstance(recipe, HealRecipe):
        dense = None if recipe.against is None else read_config(locate(recipe.against, quiet))
        return describe_healing(read_config(source), dense, recipe.config, recipe.window)
    if isinstance(recipe, InjectRecipe):
        from factormix.mix.stage1 import plan  # imports PEFT, which factor's recipes do without

        return [str(plan(empty(read_config(source)), recipe.config))]
    from factormix.mix.adapter_files import check_shapes, read_adapter_config  # imports PEFT
    from factormix.nn import sites_of

    sites, lines = sites_of(empty(read_config(source))), []
    for domain, folder in by_name("domains", recipe.domains).items():
        config = read_adapter_config(folder)
        beside = check_shapes(config, sites, folder)
        lines.append(
            f"{domain}: {config.form} of width {config.width} at sites {', '.join(str(s.index) for s in beside)}"
        )
    return lines or ["no domains"]
