"""The house stands: no import points up or in a circle, files stay short, every public name is explained."""

from __future__ import annotations

import ast
import graphlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import factormix

PACKAGE = Path(factormix.__file__).parent
FLOORS = [
    {"run"},
    {"data"},
    {"ffn", "experts"},
    {"nn"},
    {"checkpoint", "assets"},
    {"train", "evaluate"},
    {"factor", "mix", "export", "show"},
    {"loading"},
    {"cli"},
]
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
MOST_LINES = 400
MODULES = {
    ".".join(("factormix", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(module: str, tree: ast.AST, known: set[str]) -> Iterator[str]:
    """Every module of ours that `module` imports, in functions and under TYPE_CHECKING too."""
    package = module if MODULES.get(module, Path()).name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "factormix")
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            if origin.split(".")[0] == "factormix":
                for alias in node.names:
                    whole = f"{origin}.{alias.name}"
                    yield whole if whole in known else origin


def room(module: str) -> str:
    """The room of "factormix.ffn.site" is "ffn"; that of the package itself is ""."""
    return [*module.split("."), ""][1]


def upward(module: str, target: str) -> bool:
    """True for an import that the floors forbid: another room, not on a lower floor."""
    here, there = room(module), room(target)
    return here != there and not (here == "" or (there in FLOOR and FLOOR[there] < FLOOR[here]))


GRAPH = {
    module: set(imports(module, ast.parse(path.read_text(encoding="utf-8")), set(MODULES)))
    for module, path in MODULES.items()
}


def test_every_room_has_a_floor() -> None:
    unknown = {room(module) for module in MODULES} - FLOOR.keys() - {""}
    assert not unknown, f"give {unknown} a place in FLOORS and in docs/architecture.md"


def test_no_import_points_up() -> None:
    arrows = {(module, target) for module, targets in GRAPH.items() for target in targets if upward(module, target)}
    assert not arrows


def test_no_circle() -> None:
    inner = {m: targets - {m} for m, targets in GRAPH.items()}
    try:
        list(graphlib.TopologicalSorter(inner).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize(
    ("module", "source", "target", "forbidden"),
    [
        ("factormix.ffn.site", "from factormix.nn import Layout", "factormix.nn", True),
        ("factormix.ffn.site", "def f():\n    import factormix.cli.app", "factormix.cli.app", True),
        ("factormix.ffn.site", "from factormix import checkpoint", "factormix.checkpoint", True),
        ("factormix.ffn.site", "from ..experts import packed", "factormix.experts.packed", True),
        ("factormix.ffn.site", "from factormix import load", "factormix", True),
        ("factormix.factor.fit", "from factormix.mix import stage1", "factormix.mix.stage1", True),
        (
            "factormix.evaluate.suite",
            "if TYPE_CHECKING:\n    from factormix.train import train",
            "factormix.train",
            True,
        ),
        ("factormix.ffn.site", "from . import families", "factormix.ffn.families", False),
        ("factormix.ffn.site", "from factormix.run.errors import choose", "factormix.run.errors", False),
        ("factormix.cli.app", "from factormix.factor.config import FactorConfig", "factormix.factor.config", False),
    ],
)
def test_the_rule_itself(module: str, source: str, target: str, forbidden: bool) -> None:
    found = set(imports(module, ast.parse(source), set(MODULES)))
    assert found == {target} and upward(module, target) is forbidden


@pytest.mark.parametrize("module", MODULES)
def test_files_are_short_and_say_what_they_do(module: str) -> None:
    text = MODULES[module].read_text(encoding="utf-8")
    assert text.count("\n") <= MOST_LINES, f"{module} is longer than {MOST_LINES} lines; split it"
    assert ast.get_docstring(ast.parse(text)), f"{module} does not begin with what it does"


@pytest.mark.parametrize("file", [*PACKAGE.rglob("*.cpp"), *PACKAGE.rglob("*.h")], ids=lambda file: file.name)
def test_so_are_those_in_cpp(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= MOST_LINES, f"{file.name} is longer than {MOST_LINES} lines; split it"
    assert text.startswith("// "), f"{file.name} does not begin with what it does"


@pytest.mark.parametrize("name", factormix.__all__)
def test_public_names_are_explained(name: str) -> None:
    assert (inspect.getdoc(getattr(factormix, name)) or "").strip(), f"factormix.{name} has no docstring"
