"""The comparison's numbers against NumPy and SciPy, and what it refuses."""

import numpy as np
import pytest
from scipy import stats

from verl_trb.comparison import area, compare, estimate, markdown, measures, select

STEPS = (0, 10, 20, 40)


@pytest.fixture
def curves() -> dict[str, dict[int, dict[int, float]]]:
    rng = np.random.default_rng(0)
    seeds = {seed: rng.normal(0.5, 0.1) for seed in range(5)}
    return {
        method: {seed: {step: level + gain + rng.normal(0, 0.01) for step in STEPS} for seed, level in seeds.items()}
        for method, gain in (("vanilla", 0.0), ("trb/a", 0.05), ("trb/b", 0.08))
    }


def test_estimate_is_the_mean_with_students_interval() -> None:
    values = [0.3, 0.5, 0.9, 0.4]
    result = estimate(values)
    assert result.mean == pytest.approx(np.mean(values))
    assert result.error == pytest.approx(stats.sem(values))
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert (result.mean - result.margin, result.mean + result.margin) == pytest.approx((low, high))
    assert estimate([1.0]).mean == 1.0 and np.isnan(estimate([1.0]).error)


def test_area_is_the_trapezoid_rule_over_the_length() -> None:
    curve = {0: 0.0, 10: 0.4, 40: 1.0}
    assert area(curve) == pytest.approx(np.trapezoid([0.0, 0.4, 1.0], [0, 10, 40]) / 40)
    assert area({5: 0.3}) == 0.3


def test_differences_are_paired(curves) -> None:
    rows = {row.method: row for row in compare(curves, "vanilla")}
    pairs = [curves["trb/a"][seed][40] - curves["vanilla"][seed][40] for seed in range(5)]
    difference = rows["trb/a"].differences["final"]
    assert difference.mean == pytest.approx(np.mean(pairs)) and difference.error == pytest.approx(stats.sem(pairs))
    # Seeds differ by 0.1 and methods by 0.05: only pairing tells them apart.
    assert difference.mean > 2 * difference.margin > 0
    assert rows["trb/a"].measures["final"].margin > 3 * difference.margin
    assert rows["vanilla"].differences == {}


def test_only_shared_seeds_and_steps_count(curves) -> None:
    del curves["trb/a"][0]
    curves["trb/b"][1] = {0: 0.1, 20: 0.2}
    rows = {row.method: row for row in compare(curves, "vanilla")}
    assert list(rows["vanilla"].measures) == ["step 0", "step 20", "final", "area"]
    assert rows["trb/a"].differences["final"].seeds == 4 and rows["trb/b"].differences["final"].seeds == 5


def test_best_checkpoint_is_named_as_such() -> None:
    assert measures({0: 0.1, 10: 0.9, 20: 0.5}, [0, 10, 20], best=True)["best checkpoint"] == 0.9
    assert measures({0: 0.1, 10: 0.9, 20: 0.5}, [0, 10, 20])["final"] == 0.5


def test_selection_takes_the_best_setting_of_each_family(curves) -> None:
    assert select(curves) == {"vanilla": "vanilla", "trb": "trb/b"}


def test_markdown_has_every_method_and_measure(curves) -> None:
    text = markdown(compare(curves, "vanilla"))
    assert text.count("| trb/a |") == 2 and "| vanilla | 5 |" in text and "step 10 | step 20" in text


def test_what_cannot_be_compared_is_refused(curves) -> None:
    with pytest.raises(ValueError, match="baseline 'student' is not among"):
        compare(curves, "student")
    with pytest.raises(ValueError, match="no finished runs of trb/a"):
        compare({**curves, "trb/a": {}}, "vanilla")
    with pytest.raises(ValueError, match="no validation step in common"):
        compare({"vanilla": {0: {0: 0.1}}, "trb": {0: {5: 0.1}}}, "vanilla")
