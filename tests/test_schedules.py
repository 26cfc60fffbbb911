"""Schedules of the training step."""

from __future__ import annotations

import math

import pytest

from verl_trb.schedules import annealed_epsilon, piecewise_linear, warmup_factor


def test_epsilon_of_the_paper():
    """epsilon_0 in the first step, evenly down, 0 after K steps and ever after."""
    assert [annealed_epsilon(step, 0.04, 4) for step in range(1, 7)] == pytest.approx([0.04, 0.03, 0.02, 0.01, 0, 0])
    assert annealed_epsilon(1, 0.02, 50) == 0.02
    assert annealed_epsilon(26, 0.02, 50) == pytest.approx(0.01)
    assert annealed_epsilon(50, 0.02, 50) == pytest.approx(0.0004)


@pytest.mark.parametrize("warmup_steps", [1, 3, 15, 25, 50, 397])
def test_epsilon_is_exactly_zero_after_the_warmup(warmup_steps):
    values = [annealed_epsilon(step, 0.07, warmup_steps) for step in range(1, warmup_steps + 100)]
    assert all(value > 0 for value in values[:warmup_steps])
    assert all(value == 0 for value in values[warmup_steps:])
    assert values == sorted(values, reverse=True)


def test_no_budget_at_all():
    assert annealed_epsilon(1, 0.0, 10) == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((1, -0.1, 10), "epsilon"),
        ((1, math.nan, 10), "epsilon"),
        ((1, math.inf, 10), "epsilon"),
        ((1, 0.1, 0), "warmup_steps"),
        ((1, 0.1, -3), "warmup_steps"),
        ((0, 0.1, 10), "step"),
    ],
)
def test_wrong_input(arguments, word):
    with pytest.raises(ValueError, match=word):
        annealed_epsilon(*arguments)


def test_piecewise_linear():
    points = [(10, 1.0), (20, 3.0), (40, -1.0)]
    for step, value in ((0, 1.0), (10, 1.0), (15, 2.0), (20, 3.0), (30, 1.0), (40, -1.0), (99, -1.0)):
        assert piecewise_linear(step, points) == pytest.approx(value)
    assert piecewise_linear(5, [(3, 0.5)]) == piecewise_linear(0, [(3, 0.5)]) == 0.5


@pytest.mark.parametrize("points", [[], [(3, 1.0), (3, 2.0)], [(3, 1.0), (1, 2.0)]])
def test_points_that_are_no_schedule(points):
    with pytest.raises(ValueError, match="schedule"):
        piecewise_linear(0, points)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_learning_rate_rises_from_nothing_to_all(shape):
    factors = [warmup_factor(updates, 15, shape) for updates in range(20)]
    assert factors[0] == 0 and factors[15:] == [1.0] * 5
    assert all(low < high for low, high in zip(factors[:15], factors[1:16], strict=True))
    assert warmup_factor(0, 0, shape) == 1.0


def test_cosine_warm_up_is_half_a_period():
    rises = [warmup_factor(updates, 4, "cosine") for updates in range(5)]
    assert rises == pytest.approx([0, (1 - 2**-0.5) / 2, 0.5, (1 + 2**-0.5) / 2, 1])
    assert [warmup_factor(updates, 4, "linear") for updates in range(5)] == [0, 0.25, 0.5, 0.75, 1]
