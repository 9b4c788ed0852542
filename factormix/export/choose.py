"""Choose the container: the one asked for if it holds the model, else the first of `CONTAINERS` that does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from factormix.export.container import Container, Problem
from factormix.export.containers import CONTAINERS
from factormix.export.needs import Needs
from factormix.run.errors import FactorMixError, choose


@dataclass(frozen=True)
class Choice:
    """The chosen container, and the reason.

    Attributes:
        container: the container.
        needs: the model's needs after approximations.
        reason: why it was chosen, in one sentence.
        approximations: the changes that `--approximate` makes to the model, one clause each; empty if it is exact.
    """

    container: Container
    needs: Needs
    reason: str
    approximations: tuple[str, ...] = ()


def choose_container(
    needs: Needs, to: str = "auto", approximate: bool = False, among: Iterable[str] = tuple(CONTAINERS)
) -> Choice:
    """Choose a container for a model.

    Args:
        needs: the model's needs.
        to: a container's name, or "auto".
        approximate: allow changes to the model if they make a container hold it.
        among: the names that "auto" may choose.

    Raises:
        FactorMixError: the container is unknown, or none holds the model. The message says what the nearest one lacks,
            the remedies, and which containers hold it.
    """
    choose("container", to, ["auto", *CONTAINERS])
    candidates = [CONTAINERS[name] for name in (among if to == "auto" else (to,))]
    problems = {container.name: container.problems(needs) for container in candidates}
    for container in candidates:
        if not problems[container.name]:
            reason = "it was asked for" if to != "auto" else _why(container, needs)
            return Choice(container, needs, f"{container.name}: {reason}.")
    if approximate:
        fixable = [c for c in candidates if all(problem.fix is not None for problem in problems[c.name])]
        for container in sorted(fixable, key=lambda c: len(problems[c.name])):
            fixed = needs
            for problem in problems[container.name]:
                assert problem.fix is not None
                fixed = problem.fix(fixed)
            if not container.problems(fixed):
                lacks = "; ".join(problem.reason for problem in problems[container.name])
                costs = tuple(problem.costs for problem in problems[container.name])
                return Choice(container, fixed, f"{container.name}, approximated: it {lacks}.", costs)
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
