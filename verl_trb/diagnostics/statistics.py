"""Numbers of the diagnostics: how well a score ranks right above wrong, shares with intervals, means by position.

Pure functions of sequences of numbers.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959964  # of a 95% interval


@dataclass(frozen=True)
class Interval:
    """An estimate with a 95% interval, of `count` values."""

    value: float
    low: float
    high: float
    count: int


def share(successes: int, count: int) -> Interval:
    """A share with Wilson's interval, which stays inside [0, 1]. Raises ValueError if there is nothing to share."""
    if not 0 <= successes <= count or count == 0:
        raise ValueError(f"{successes} of {count} is no share.")
    p, z2 = successes / count, Z95**2
    center = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 * math.sqrt(p * (1 - p) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return Interval(p, min(p, center - half), max(p, center + half), count)


def mean(values: Sequence[float]) -> Interval:
    """A mean with its normal interval; infinitely wide for one value. Raises ValueError for none."""
    if not values:
        raise ValueError("There are no values to average.")
    n, middle = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Interval(middle, -math.inf, math.inf, 1)
    half = Z95 * math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (n - 1) / n)
    return Interval(middle, middle - half, middle + half, n)


def auroc(scores: Sequence[float], right: Sequence[bool]) -> Interval:
    """P(a right one's score > a wrong one's), ties counting half, with DeLong's interval (cut to [0, 1]).

    scores: finite or infinite, not NaN. Raises ValueError if all are right or all are wrong.
    """
    positives = sorted(score for score, yes in zip(scores, right, strict=True) if yes)
    negatives = sorted(score for score, yes in zip(scores, right, strict=True) if not yes)
    if not positives or not negatives:
        raise ValueError(f"All rollouts are {'right' if positives else 'wrong'}: there is nothing to rank.")
    above = [_below(negatives, score) / len(negatives) for score in positives]
    under = [1 - _below(positives, score) / len(positives) for score in negatives]
    area = math.fsum(above) / len(above)
    half = Z95 * math.sqrt(_variance(above) / len(above) + _variance(under) / len(under))
    return Interval(area, max(0.0, area - half), min(1.0, area + half), len(scores))


def roc(scores: Sequence[float], right: Sequence[bool]) -> list[tuple[float, float]]:
    """The curve under which `auroc` is the area: (share of wrong, share of right) at or above each score."""
    positives, points, seen = sum(right), [(0.0, 0.0)], [0, 0]
    ranked = sorted(zip(scores, right, strict=True), reverse=True)
    for place, (score, yes) in enumerate(ranked):
        seen[yes] += 1
        if place + 1 == len(ranked) or ranked[place + 1][0] != score:
            points.append((seen[0] / (len(ranked) - positives), seen[1] / positives))
    return points


def by_position(values: Sequence[Sequence[float]], least: int = 2) -> list[Interval]:
    """The mean at each position over the sequences that reach it; ends where fewer than `least` do."""
    longest = max(map(len, values), default=0)
    columns = [[row[place] for row in values if len(row) > place] for place in range(longest)]
    return [mean(column) for column in columns if len(column) >= least]


def _below(ordered: list[float], score: float) -> float:
    """How many of `ordered` are smaller than `score`, equal ones counting half."""
    return (bisect.bisect_left(ordered, score) + bisect.bisect_right(ordered, score)) / 2


def _variance(values: list[float]) -> float:
    if len(values) < 2:
        return math.inf
    middle = math.fsum(values) / len(values)
    return math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1)
