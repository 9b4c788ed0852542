"""Retention: which tasks count, the pooled ratio, and an interval that is paired."""

import math

import pytest
import torch

from factormix.evaluate.retention import TaskScore, pooled_retention, standard_error


def answers(right: int, n: int) -> torch.Tensor:
    return torch.tensor([1.0] * right + [0.0] * (n - right))


def choice(base: int, model: int, n: int = 400, chance: float = 0.25) -> TaskScore:
    return TaskScore("choice", chance, answers(model, n), answers(base, n))


def test_standard_error_by_hand():
    assert standard_error(answers(100, 400)) == pytest.approx(math.sqrt(0.25 * 0.75 / 400))
    made = choice(base=200, model=100).to_dict()
    assert (made["base"], made["model"], made["n"], made["chance"]) == (0.5, 0.25, 400, 0.25)
    assert made["base_stderr"] == pytest.approx(0.025) and made["stderr"] == pytest.approx(0.02165, abs=1e-5)


@pytest.mark.parametrize(
    ("base", "counts"),
    [(145, False), (147, False), (150, True), (300, True), (100, False), (50, False), (400, True)],
)
def test_a_task_counts_from_five_standard_errors_above_chance(base, counts):
    # of 400 at chance 0.25: 149 right is 0.3725, 0.1225 above chance, 5.07 standard errors of 0.0242
    assert choice(base=base, model=100).informative is counts


def test_without_a_base_nothing_is_said():
    alone = TaskScore("choice", 0.25, answers(5, 10))
    assert alone.informative is None and alone.to_dict()["base"] is None
    assert pooled_retention({"one": alone}) is None
    assert pooled_retention({"guessing": choice(base=105, model=105)}) is None


def test_pooled_ratio_leaves_out_what_does_not_tell():
    tasks = {"a": choice(320, 240), "guess": choice(104, 104), "b": choice(200, 180, chance=0.2)}
    found = pooled_retention(tasks)
    assert found.tasks == ("a", "b") and found.not_informative == ("guess",)
    assert found.retention == pytest.approx((0.6 + 0.45) / (0.8 + 0.5))
    assert found.above_chance == pytest.approx((0.35 + 0.25) / (0.55 + 0.3))
    low, high = found.interval
    assert low < found.retention < high and high - low < 0.2
    assert found.above_chance_interval[0] < found.above_chance < found.above_chance_interval[1]


def test_the_interval_is_paired():
    """Equal answers leave no doubt; the same accuracies on unrelated questions do."""
    same = choice(300, 300)
    assert pooled_retention({"a": same}).interval == (1.0, 1.0)
    shuffled = TaskScore("choice", 0.25, same.model.flip(0), same.base)
    low, high = pooled_retention({"a": shuffled}).interval
    assert low < 0.95 and high > 1.05


def test_the_interval_is_as_wide_as_theory_says():
    """Base right everywhere, model right on p: the ratio is the model's accuracy, and its interval p +- 1.96 s."""
    found = pooled_retention({"a": TaskScore("choice", 0.0, answers(640, 1000), answers(1000, 1000))})
    half = 1.96 * math.sqrt(0.64 * 0.36 / 1000)
    assert found.interval == pytest.approx((0.64 - half, 0.64 + half), abs=0.004)
    again = pooled_retention({"a": TaskScore("choice", 0.0, answers(640, 1000), answers(1000, 1000))})
    assert again == found
