"""Which container: the one asked for if it holds the model, else the first in the order of `CONTAINERS` that does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from factormix.export.container import Container, Problem
from factormix.export.containers import CONTAINERS
from factormix.export.needs import Needs
from factormix.run.errors import FactorMixError, choose


@dataclass(frozen=True)
class Choice:
    """A container and why.

    Attributes:
        container: which.
        needs: what it is to hold, after approximations.
        reason: one sentence.
        approximations: what `--approximate` does to the model, clause by clause; empty for an exact export.
    """

    container: Container
    needs: Needs
    reason: str
    approximations: tuple[str, ...] = ()


def choose_container(
    needs: Needs, to: str = "auto", approximate: bool = False, among: Iterable[str] = tuple(CONTAINERS)
) -> Choice:
    """The container for a model.

    Args:
        needs: of the model.
        to: a container's name, or "auto".
        approximate: change the model where that makes a container hold it, and say how.
        among: what "auto" may take.

    Raises:
        FactorMixError: an unknown container; none that holds it, with what each lacks, the remedies and the containers
            that do.
    """
    choose("container", to, ["auto", *CONTAINERS])
    open_to = [CONTAINERS[name] for name in (among if to == "auto" else (to,))]
    problems = {each.name: each.problems(needs) for each in open_to}
    for each in open_to:
        if not problems[each.name]:
            asked = "it was asked for" if to != "auto" else _why(each, needs)
            return Choice(each, needs, f"{each.name}: {asked}.")
    if approximate:
        fitting = [each for each in open_to if all(p.fix is not None for p in problems[each.name])]
        for each in sorted(fitting, key=lambda c: len(problems[c.name])):
            fixed = needs
            for problem in problems[each.name]:
                assert problem.fix is not None
                fixed = problem.fix(fixed)
            if not each.problems(fixed):
                lacks = "; ".join(problem.reason for problem in problems[each.name])
                costs = tuple(problem.costs for problem in problems[each.name])
                return Choice(each, fixed, f"{each.name}, approximated: it {lacks}.", costs)
    raise FactorMixError(_refusal(needs, problems))


def _why(container: Container, needs: Needs) -> str:
    shared = f"{needs.shared} shared neurons" if needs.shared else "no shared neurons"
    return f"a {needs.backbone.family} model with {shared}; {container.about}"


def _refusal(needs: Needs, problems: dict[str, list[Problem]]) -> str:
    nearest = min(problems, key=lambda name: len([p for p in problems[name] if p.fix is None] * 10 + problems[name]))
    lines = "; ".join(f"it {problem.reason}. {problem.remedy}" for problem in problems[nearest])
    message = f"{nearest} cannot hold this {needs.backbone.family} model of layout {needs.layout} exactly: {lines}"
    holding = [name for name, each in CONTAINERS.items() if not each.problems(needs)]
    if holding:
        message += f" Containers that hold it: {', '.join(holding)}."
    elif all(problem.fix is not None for problem in problems[nearest]):
        costs = "; ".join(problem.costs for problem in problems[nearest])
        message += f" Or give --approximate: {costs}."
    return message
