"""Accuracy from n samples a problem: pass@k without bias, and how sure a mean over problems is.

Pure functions of numbers. P problems of a set, c correct of n samples of each.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
_BLOCK = 1 << 22  # drawn indices held at one time


class Interval(NamedTuple):
    """A mean, and the ends of its confidence interval."""

    mean: float
    low: float
    high: float


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): the chance that at least one of k samples, of n of which c are correct, is correct.

    Without bias for any k <= n (Chen et al. 2021, arXiv 2107.03374); k = 1 is c / n. A sum of logarithms, so that no
    binomial overflows and a small chance keeps its digits. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    if k == 1:
        return c / n
    if n - c < k:
        return 1.0
    return -math.expm1(math.fsum(math.log1p(-c / size) for size in range(n - k + 1, n + 1)))


def passes(counts: Iterable[tuple[int, int]], k: int) -> np.ndarray:
    """pass@k of each problem: float64 [P], for (n, c) of each."""
    return np.array([pass_at_k(n, c, k) for n, c in counts], dtype=np.float64)


def bootstrap(
    sets: Sequence[np.ndarray], *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> Interval:
    """The mean over sets of the mean over a set's problems, with its percentile bootstrap interval over problems.

    Problems are drawn again with replacement within each set; the samples of a problem stay as they are. The same
    values and seed give the same interval.

    Args:
        sets: one array [P] of values a set, none empty.
        level: of confidence.
    """
    if not sets or any(len(values) == 0 for values in sets):
        raise ValueError("There are no problems to average.")
    random, means = np.random.default_rng(seed), np.zeros(resamples)
    for values in sets:
        step = max(1, _BLOCK // len(values))
        for start in range(0, resamples, step):
            drawn = random.integers(len(values), size=(min(step, resamples - start), len(values)))
            means[start : start + step] += values[drawn].mean(axis=1)
    low, high = np.quantile(means / len(sets), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.mean([values.mean() for values in sets])), float(low), float(high))
