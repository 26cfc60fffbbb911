"""Rollout statistics: sums, maxima, merging of engines, and the per-token means that are logged.

That the engine feeds them the right tokens is tested in test_engine_exact.py.
"""

from __future__ import annotations

import math

import pytest
import torch

from verl_trb.rollout.statistics import RolloutStatistics, merge, rollout_metrics


def filled(seed: int, steps: int = 5) -> tuple[dict[str, float], dict[str, list[float]]]:
    """What `take` returns after a few steps of ragged size, and all values that went in."""
    generator = torch.Generator().manual_seed(seed)
    statistics, fed = RolloutStatistics(torch.device("cpu")), {}
    for step in range(steps):
        size = [3, 0, 7, 1, 4][step]
        kept = torch.rand(4, 2, generator=generator) < 0.5
        beta, kl, other = torch.rand(3, size, generator=generator)
        values = {"tokens": kept, "beta": beta, "beta_max": beta, "kl": kl, "kl_max": kl, "tv": other}
        statistics.add(**values)
        for name, value in values.items():
            fed.setdefault(name, []).extend(value.flatten().tolist())
    return statistics.take(), fed


def test_sums_and_maxima() -> None:
    taken, fed = filled(0)
    assert taken["tokens"] == sum(fed["tokens"])
    assert taken["beta"] == pytest.approx(sum(fed["beta"]), rel=1e-6)
    assert taken["tv"] == pytest.approx(sum(fed["tv"]), rel=1e-6)
    assert taken["beta_max"] == max(fed["beta"])
    assert taken["kl_max"] == max(fed["kl"])
    assert taken["accepted"] == 0.0


def test_taking_starts_anew() -> None:
    statistics = RolloutStatistics(torch.device("cpu"))
    statistics.add(tokens=torch.tensor([True]), kl_max=torch.tensor([0.5]))
    assert statistics.take()["kl_max"] == 0.5
    assert set(statistics.take().values()) == {0.0}


def test_many_small_values_are_summed_in_double_precision() -> None:
    """A long step: 2²⁰ tokens of KL 0.1 after a sum of 10⁷, which float32 would lose."""
    statistics = RolloutStatistics(torch.device("cpu"))
    statistics.add(kl=torch.tensor([1e7]))
    for _ in range(1024):
        statistics.add(kl=torch.full((1024,), 0.1))
    assert statistics.take()["kl"] == pytest.approx(1e7 + 0.1 * 2**20, rel=1e-7)


def test_merging_engines_is_pooling_their_tokens() -> None:
    (first, fed), (second, more) = filled(1), filled(2)
    merged = merge([{**first, "resubmitted": 2.0}, {**second, "resubmitted": 3.0}, {}])
    for name in ("tokens", "beta", "kl", "tv"):
        assert merged[name] == pytest.approx(sum(fed[name]) + sum(more[name]), rel=1e-6)
    for name in ("beta", "kl"):
        assert merged[f"{name}_max"] == max(fed[name] + more[name])
    assert merged["resubmitted"] == 5.0
    assert merge([]) == {}


def test_metrics_are_means_per_token() -> None:
    """Ten tokens in four blocks, two of them corrections."""
    sums = dict(tokens=10.0, verified=10.0, accepted=8.0, blocks=4.0, beta=3.0, kl=0.2, tv=1.9)
    sums.update(log_ratio=0.3, beta_max=0.7, kl_max=0.05)
    metrics = rollout_metrics(sums)
    expected = {
        "trb/beta/mean": 0.3,
        "trb/beta/max": 0.7,
        "trb/kl/mean": 0.02,
        "trb/kl/max": 0.05,
        "trb/tv": 0.19,
        "trb/acceptance": 0.8,
        "trb/tokens_per_teacher_pass": 2.5,
        "trb/log_ratio": 0.03,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_nothing_sampled_gives_no_metrics() -> None:
    assert rollout_metrics(RolloutStatistics(torch.device("cpu")).take()) == {}
    assert rollout_metrics({}) == {}
    assert not any(math.isnan(value) for value in rollout_metrics({**filled(3)[0], "log_ratio": 0.0}).values())
