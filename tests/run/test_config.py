"""Configs: one dataclass for Python, YAML and flags; every wrong value is refused with the value and the remedy."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Literal

import pytest

from factormix.run.config import REQUIRED, Config, describe, option
from factormix.run.errors import FactorMixError, choose, nearest


@dataclass(frozen=True)
class Heal(Config):
    steps: int = option(200, help="optimiser steps", minimum=1)
    rate: float = option(1e-4, help="learning rate", minimum=0.0, maximum=1.0)
    loss: str = option("kl", help="held to", choices=("kl", "mse"))


@dataclass(frozen=True)
class Recipe(Config):
    model: str = option(help="model name or folder")
    text: tuple[Path, ...] = option((), help="text files")
    layers: list[int] | None = option(None, help="layers", minimum=0)
    resume: bool = option(True, help="resume")
    dtype: Literal["float32", "bfloat16"] = option("float32", help="dtype")
    heal: Heal = option(Heal, help="healing")
    budget: dict[str, float] = option({}, help="active fraction by layer")

    def validate(self) -> None:
        super().validate()
        if self.resume and self.layers == []:
            raise FactorMixError("layers is empty; name at least one.")


def test_python_yaml_and_dict_agree(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\ntext: [a.txt, b.txt]\nlayers: 3\nheal: {steps: 50, rate: 1e-5}\nbudget: {a: 1}\n")
    expected = Recipe(
        model="m", text=(Path("a.txt"), Path("b.txt")), layers=[3], heal=Heal(steps=50, rate=1e-5), budget={"a": 1.0}
    )
    assert Recipe.from_yaml(path) == expected
    assert Recipe.from_dict(expected.to_dict()) == expected
    assert isinstance(Recipe.from_yaml(path).heal.rate, float)  # PyYAML reads 1e-5 as a string


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model": "m", "dtyp": "float32"}, ["'dtyp'", "Did you mean 'dtype'?"]),
        ({"model": "m", "heal": {"stepps": 3}}, ["Heal", "'stepps'", "Did you mean 'steps'?"]),
        ({}, ["needs 'model'", "model name or folder"]),
        ({"model": 3}, ["Recipe.model", "received 3", "str"]),
        ({"model": "m", "resume": 1}, ["Recipe.resume", "received 1", "bool"]),
        ({"model": "m", "layers": [1, "x"]}, ["Recipe.layers[1]", "'x'", "int"]),
        ({"model": "m", "layers": [1, -2]}, ["Recipe.layers", "-2", "at least 0"]),
        ({"model": "m", "layers": []}, ["layers is empty"]),
        ({"model": "m", "dtype": "float23"}, ["'float23'", "'bfloat16'", "Did you mean 'float32'?"]),
        ({"model": "m", "heal": {"steps": 0}}, ["Heal.steps", "0", "at least 1"]),
        ({"model": "m", "heal": {"steps": "1.5"}}, ["Heal.steps", "'1.5'", "int"]),
        ({"model": "m", "heal": {"steps": 1.5}}, ["Heal.steps", "1.5", "int"]),
        ({"model": "m", "heal": {"steps": True}}, ["Heal.steps", "True", "int"]),
        ({"model": "m", "heal": {"rate": float("nan")}}, ["Heal.rate", "nan", "from 0.0 to 1.0"]),
        ({"model": "m", "heal": {"loss": "ms"}}, ["Heal.loss", "'ms'", "'kl', 'mse'", "Did you mean 'mse'?"]),
        ({"model": "m", "heal": 3}, ["Recipe.heal", "received 3", "Heal"]),
    ],
)
def test_wrong_values_are_refused_with_the_remedy(values: dict, words: list[str]) -> None:
    with pytest.raises(FactorMixError) as caught:
        Recipe.from_dict(values)
    assert all(word in str(caught.value) for word in words), caught.value


def test_yaml_errors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("model: [")
    (tmp_path / "list.yaml").write_text("- 1")
    for name in ("bad.yaml", "list.yaml", "none.yaml"):
        with pytest.raises(FactorMixError, match=name):
            Recipe.from_yaml(tmp_path / name)


def test_replace_checks_and_leaves_the_original() -> None:
    heal = Heal()
    assert heal.replace(steps="5").steps == 5 and heal.steps == 200
    with pytest.raises(FactorMixError, match="at least 1"):
        heal.replace(steps=0)
    with pytest.raises(FactorMixError, match="Did you mean 'rate'"):
        heal.replace(rat=0.1)
    with pytest.raises(FrozenInstanceError):
        heal.steps = 3  # type: ignore[misc]


def test_describe_is_what_a_command_line_needs() -> None:
    by_name = {item.name: item for item in describe(Recipe)}
    assert by_name["model"].default is REQUIRED
    assert by_name["heal"] == ("heal", Heal, Heal(), "healing", None)
    assert [(o.name, o.type, o.default, o.choices) for o in describe(Heal)][2] == ("loss", str, "kl", ("kl", "mse"))


def test_default_containers_are_not_shared() -> None:
    first, second = Recipe(model="a"), Recipe(model="b")
    first.budget["x"] = 1.0
    assert second.budget == {}


def test_nearest_and_choose() -> None:
    assert nearest("GATE", ["gate", "up"]) == " Did you mean 'gate'?"
    assert nearest("zzz", ["gate"]) == ""
    assert choose("gate", "hard", {"hard": 1, "soft": 2}) == "hard"
    with pytest.raises(FactorMixError, match="unknown gate 'sofd'; allowed: 'hard', 'soft'. Did you mean 'soft'?"):
        choose("gate", "sofd", ("hard", "soft"))
