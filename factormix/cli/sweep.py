"""`factormix sweep`: quality over a grid of recipes; each cell is a `factor` run of its own, then an `eval`.

model: asset:smollm2
text: [asset:brown-train]
sweep:                              # every combination is a cell
  layout: [S8A4E16, S4A4E16, S2A2E16]
  preset: [default, cmoe, flap]
  heal.tokens: [0, 300000]
eval: {suite: text, tokens: 16384}  # flags of `factormix eval`
tokens: 65536                       # the rest is a recipe of `factormix factor`

A cell runs in processes of its own, so that its memory is its own. A cell that is finished is skipped, one that was
killed goes on where it was.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml  # type: ignore[import-untyped, unused-ignore]

from factormix.cli import options
from factormix.cli.recipe import Recipe, read_yaml
from factormix.evaluate.sweep_table import sweep_row, write_sweep
from factormix.run.directory import write_json
from factormix.run.errors import FactorMixError, choose
from factormix.run.progress import say

EVAL_FLAGS = (
    "suite",
    "text",
    "last_word",
    "tasks",
    "tokens",
    "last_word_tokens",
    "limit",
    "in_domain",
    "window",
    "seed",
)


@dataclass(frozen=True)
class Cell:
    """One point of the grid: its folder's name, what the grid set, and its whole recipe."""

    name: str
    values: dict[str, Any]
    recipe: dict[str, Any]


def sweep(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="a YAML file with the grid under `sweep`")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="the directory to write, or to go on in")],
    keep_models: Annotated[bool, typer.Option("--keep-models", help="keep each cell's model after its eval")] = False,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    dry_run: options.DryRun = False,
    quiet: options.Quiet = False,
) -> None:
    """Factor MODEL once for every cell of the grid in RECIPE, evaluate each, and write a table and a plot to DIR."""
    cells, flags = read_cells(recipe)
    if dry_run:
        typer.echo("\n".join([f"{len(cells)} cells", *(cell.name for cell in cells)]))
        return
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, cell in enumerate(cells, start=1):
        folder = out / cell.name
        if not _finished(folder, cell, flags):
            say(f"cell {number} of {len(cells)}: {cell.name}", quiet)
            _run_cell(folder, cell, flags, ["--device", device, "--dtype", dtype, *(["--quiet"] if quiet else [])])
        if not keep_models:
            shutil.rmtree(folder / "model", ignore_errors=True)
        rows.append(sweep_row(cell.values, _read(folder / "run.json"), _read(folder / "eval.json")))
        write_sweep(out, list(cells[0].values), rows)  # after every cell: a sweep may take days
    typer.echo((out / "sweep.md").read_text(encoding="utf-8"))


def read_cells(path: Path) -> tuple[list[Cell], dict[str, Any]]:
    """The cells of a sweep's recipe, each one a valid recipe, and the flags for `eval`.

    Raises:
        FactorMixError: no grid, an unknown key, a cell that cannot be: before anything is computed.
    """
    values = read_yaml(path)
    grid, flags = values.pop("sweep", None), values.pop("eval", None) or {"suite": "text"}
    if not isinstance(grid, Mapping) or not grid or not all(isinstance(v, list) and v for v in grid.values()):
        raise FactorMixError(
            f"recipe {str(path)!r} needs a mapping `sweep` of keys to lists of values, such as "
            f"{{layout: [S8A4E16, S4A4E16]}}; received {grid!r}."
        )
    for key in flags:
        choose("key of `eval`", key, EVAL_FLAGS)
    cells = []
    for point in itertools.product(*grid.values()):
        chosen = dict(zip(grid, point, strict=True))
        recipe = json.loads(json.dumps(values))  # a copy that shares nothing
        for key, value in chosen.items():
            place = recipe
            *outer, last = key.split(".")
            for each in outer:
                place = place.setdefault(each, {})
            place[last] = value
        name = "_".join(f"{key}-{value}" for key, value in chosen.items())
        plan = _checked(recipe, name)
        if not plan.model:
            raise FactorMixError(f"recipe {str(path)!r} names no model.")
        cells.append(Cell(re.sub(r"[^\w.-]", "-", name), chosen, recipe))
    return cells, dict(flags)


def _checked(recipe: dict[str, Any], name: str) -> Recipe:
    try:
        return Recipe.build(recipe)
    except FactorMixError as error:
        raise FactorMixError(f"cell {name}: {error}") from error


def _finished(folder: Path, cell: Cell, flags: Mapping[str, Any]) -> bool:
    """Whether this very cell is done; a folder of another recipe is refused, not overwritten."""
    file = folder / "cell.json"
    if not file.is_file():
        return False
    if _read(file) != {"recipe": cell.recipe, "eval": dict(flags)}:
        raise FactorMixError(
            f"{str(folder)!r} was made by another recipe (see its cell.json); choose another DIR, or remove it."
        )
    return (folder / "eval.json").is_file() and (folder / "run.json").is_file()


def _run_cell(folder: Path, cell: Cell, flags: Mapping[str, Any], common: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "cell.json", {"recipe": cell.recipe, "eval": dict(flags)})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(cell.recipe, sort_keys=False), encoding="utf-8")
    model = folder / "model"
    if not (model / "run.json").is_file():
        run_command(["factor", "--recipe", str(folder / "recipe.yaml"), "-o", str(model), *common])
    shutil.copy(model / "run.json", folder / "run.json")
    words = ["eval", str(model), "--against", str(cell.recipe["model"]), "--json", str(folder / "eval.json")]
    for key, value in flags.items():
        for each in value if isinstance(value, list) else [value]:
            words += [f"--{key.replace('_', '-')}", str(each)]
    run_command([*words, *common])


def run_command(words: Sequence[str]) -> None:
    """Run `factormix WORDS` in a process of its own.

    Raises:
        FactorMixError: it failed; its own message stands on stderr.
    """
    program = "from factormix.cli.app import main; main()"
    code = subprocess.run([sys.executable, "-c", program, *words], stdout=subprocess.DEVNULL, check=False).returncode
    if code:
        raise FactorMixError(
            f"`factormix {' '.join(words)}` failed with exit code {code}; give the same command again to go on."
        )


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
