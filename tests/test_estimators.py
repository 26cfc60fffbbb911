"""pass@k and the bootstrap against naive oracles, and how often its intervals hold the truth."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from verl_trb.evaluation.estimators import bootstrap, pass_at_k, passes


def by_counting(n: int, c: int, k: int) -> Fraction:
    """The share of all subsets of k of n samples, the first c of them correct, that hold a correct one."""
    subsets = list(itertools.combinations(range(n), k))
    return Fraction(sum(any(sample < c for sample in subset) for subset in subsets), len(subsets))


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets(n: int) -> None:
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        assert pass_at_k(n, c, k) == pytest.approx(float(by_counting(n, c, k)), rel=1e-14, abs=1e-300)


@pytest.mark.parametrize(
    ("n", "c", "k"), [(512, 1, 2), (512, 100, 256), (512, 3, 500), (10_000, 1, 2), (10_000, 7, 9_000), (2_000, 900, 64)]
)
def test_pass_at_k_keeps_its_digits(n: int, c: int, k: int) -> None:
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), rel=1e-12)


def test_pass_at_one_is_the_share_of_correct_samples() -> None:
    assert [pass_at_k(7, c, 1) for c in range(8)] == [c / 7 for c in range(8)]


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_what_cannot_be(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(n, c, k)


def test_pass_at_k_is_unbiased() -> None:
    """Over draws of n samples its mean is 1 - (1-p)^k: the exact expectation, from the binomial distribution."""
    n, p = 9, 0.23
    chances = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    for k in range(1, n + 1):
        expected = math.fsum(chance * pass_at_k(n, c, k) for c, chance in enumerate(chances))
        assert expected == pytest.approx(1 - (1 - p) ** k, rel=1e-12)


def test_bootstrap_is_that_of_the_binomial() -> None:
    """Of P values, half 0 and half 1, a resampled mean is binomial: the ends are its quantiles."""
    from scipy.stats import binom

    found = bootstrap([np.array([0.0, 1.0] * 100)], resamples=200_000)
    assert found.mean == 0.5
    assert found.low == pytest.approx(binom.ppf(0.025, 200, 0.5) / 200, abs=0.003)
    assert found.high == pytest.approx(binom.ppf(0.975, 200, 0.5) / 200, abs=0.003)


def test_bootstrap_over_sets_counts_sets_the_same() -> None:
    small, large = np.array([1.0, 1.0]), np.zeros(1000)
    found = bootstrap([small, large])
    assert found == (0.5, 0.5, 0.5)


def test_bootstrap_repeats_under_a_seed_and_differs_under_another() -> None:
    values = [np.random.default_rng(0).random(50)]
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)


def test_bootstrap_in_blocks_uses_every_resample() -> None:
    """A set too large for one block of resamples: still as wide as the central limit theorem says, within 5%."""
    values = np.random.default_rng(1).random(3_000)
    found = bootstrap([values], resamples=4_000)
    width = 2 * 1.96 * values.std() / math.sqrt(len(values))
    assert found.high - found.low == pytest.approx(width, rel=0.05)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """400 evaluations of 60 problems with 4 samples, of known chances: 95% intervals hold the true mean 95 ± 3.5 times
    in a hundred (3.2 standard errors of 400 draws; the percentile interval is a little too narrow).
    """
    random = np.random.default_rng(20)
    held = 0
    for _ in range(400):
        chances = random.beta(0.6, 1.0, size=60)  # problems are draws too
        counts = [(4, int(c)) for c in random.binomial(4, chances)]
        found = bootstrap([passes(counts, 1)], resamples=1_000, seed=int(random.integers(1 << 30)))
        held += found.low <= 0.6 / 1.6 <= found.high
    assert 0.915 <= held / 400 <= 0.985


def test_no_problems_are_refused() -> None:
    for sets in ([], [np.array([])]):
        with pytest.raises(ValueError, match="no problems"):
            bootstrap(sets)
