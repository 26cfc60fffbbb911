"""The diagnostics' numbers against naive definitions and, for the intervals, against how often they hold the truth."""

import math
import random

import pytest

from verl_trb.diagnostics.statistics import auroc, by_position, mean, roc, share


def naive_auroc(scores: list[float], right: list[bool]) -> float:
    pairs = [
        (a, b) for a, x in zip(scores, right, strict=True) if x for b, y in zip(scores, right, strict=True) if not y
    ]
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)


def test_auroc_is_the_share_of_pairs_with_ties_as_halves() -> None:
    rng = random.Random(0)
    for _ in range(200):
        n = rng.randint(2, 30)
        scores = [float(rng.randint(0, 6)) for _ in range(n)]  # many ties
        right = [True, False, *(rng.random() < 0.4 for _ in range(n - 2))]
        found = auroc(scores, right)
        assert found.value == pytest.approx(naive_auroc(scores, right), abs=1e-12)
        assert found.low <= found.value <= found.high and found.count == n


def test_auroc_of_extremes() -> None:
    assert auroc([1, 2, 3, 4], [False, False, True, True]).value == 1.0
    assert auroc([4, 3, 2, 1], [False, False, True, True]).value == 0.0
    assert auroc([1, 1, 1], [True, False, True]).value == 0.5
    assert auroc([-math.inf, 0.0, -math.inf], [False, True, True]).value == pytest.approx(0.75)
    for right, says in (([True, True], "right"), ([False, False], "wrong")):
        with pytest.raises(ValueError, match=f"All rollouts are {says}"):
            auroc([0.1, 0.2], right)


def test_aurocs_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng, held, trials = random.Random(1), 0, 1000
    truth = 0.5 * (1 + math.erf(1.0 / 2))  # P(N(1,1) > N(0,1))
    for _ in range(trials):
        right = [place < 40 for place in range(100)]
        interval = auroc([rng.gauss(1.0 if yes else 0.0, 1) for yes in right], right)
        held += interval.low <= truth <= interval.high
    assert 0.92 < held / trials < 0.975  # the interval is an approximation; seed fixed


def test_the_curves_area_is_the_auroc() -> None:
    rng = random.Random(2)
    for _ in range(50):
        scores = [float(rng.randint(0, 8)) for _ in range(40)]
        right = [True, False, *(rng.random() < 0.5 for _ in range(38))]
        points = roc(scores, right)
        assert points[0] == (0.0, 0.0) and points[-1] == (1.0, 1.0)
        area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in zip(points, points[1:], strict=False))
        assert area == pytest.approx(auroc(scores, right).value, abs=1e-12)


def test_wilsons_interval_solves_its_equation() -> None:
    for successes, count in ((0, 10), (3, 10), (10, 10), (1, 1), (50, 200)):
        interval = share(successes, count)
        assert 0 <= interval.low <= interval.value == successes / count <= interval.high <= 1
        for bound in (interval.low, interval.high):  # |p - bound| is 1.96 standard errors of the bound itself
            if 0 < bound < 1:
                error = math.sqrt(bound * (1 - bound) / count)
                assert abs(interval.value - bound) == pytest.approx(1.959964 * error, rel=1e-6)
    with pytest.raises(ValueError, match="no share"):
        share(0, 0)


def test_means_and_positions() -> None:
    interval = mean([1.0, 2.0, 4.0])
    error = math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2 / 3)
    assert interval.value == pytest.approx(7 / 3)
    assert interval.high - interval.value == pytest.approx(1.959964 * error)
    places = by_position([[1.0, 5.0, 9.0], [3.0, 7.0], [5.0]])
    assert [(p.value, p.count) for p in places] == [(3.0, 3), (6.0, 2)]
    assert by_position([]) == []
    with pytest.raises(ValueError, match="no values"):
        mean([])
