"""The choice of the number of drafts, in simulated engines with known costs: near the best fixed one, and unbiased.

A simulated step costs what `seconds` says, with 5% of noise, and accepts each draft with one probability.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from verl_trb.coupling import couple
from verl_trb.rollout.draft_length import DraftLength

LONGEST = 8
Seconds = Callable[[int, int], float]


def memory_bound(rows: int, drafts: int) -> float:
    return 9e-3 * drafts + 40e-3


def compute_bound(rows: int, drafts: int) -> float:
    return (9e-3 + 0.2e-3 * rows) * drafts + max(40e-3, 2.5e-3 * rows * drafts)


def overhead(rows: int, drafts: int) -> float:
    return 20e-3 + 0.5e-3 * drafts


def expected_tokens(drafts: int, acceptance: float) -> float:
    return sum(acceptance**place for place in range(drafts))


def run(length: DraftLength, seconds: Seconds, rows: int, acceptance: float, steps: int, draw: random.Random) -> float:
    """Expected tokens a second over the steps, as the engine makes them: verify a block, draft the next one."""
    verified, tokens, time = length.choose(rows), 0.0, 0.0
    for _ in range(steps):
        for _ in range(rows):
            emitted = 1
            while emitted < verified and draw.random() < acceptance:
                emitted += 1
            length.saw_block(verified, emitted)
        drafted = length.choose(rows)
        took = seconds(rows, verified) * draw.uniform(0.95, 1.05)
        if drafted == verified:
            length.saw_step(rows, drafted, took)
        tokens += rows * expected_tokens(verified, acceptance)
        time += seconds(rows, verified)
        verified = drafted
    return tokens / time


def best_fixed(seconds: Seconds, rows: int, acceptance: float) -> float:
    return max(rows * expected_tokens(g, acceptance) / seconds(rows, g) for g in range(1, LONGEST + 1))


@pytest.mark.parametrize("seconds", [memory_bound, compute_bound, overhead])
@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("acceptance", [0.6, 0.92, 1.0])
def test_no_more_than_five_percent_slower_than_the_best_fixed_length(
    seconds: Seconds, rows: int, acceptance: float
) -> None:
    length, draw = DraftLength(LONGEST), random.Random(0)
    run(length, seconds, rows, acceptance, 40, draw)  # learning
    assert run(length, seconds, rows, acceptance, 200, draw) > 0.95 * best_fixed(seconds, rows, acceptance)


def test_it_follows_an_acceptance_that_rises_and_batches_that_shrink() -> None:
    length, draw = DraftLength(LONGEST), random.Random(0)
    for acceptance in (0.7, 0.8, 0.9, 1.0):
        for rows in (16, 12, 9, 5, 2, 1):
            run(length, compute_bound, rows, acceptance, 30, draw)
        for rows in (16, 12, 9, 5, 2, 1):
            rate = run(length, compute_bound, rows, acceptance, 60, draw)
            assert rate > 0.93 * best_fixed(compute_bound, rows, acceptance)
    assert length.acceptance > 0.99


def test_single_slow_steps_do_not_mislead() -> None:
    """One step in ten takes thirty times as long."""

    def disturbed(rows: int, drafts: int) -> float:
        return memory_bound(rows, drafts) * (30 if draw.random() < 0.1 else 1)

    length, draw = DraftLength(LONGEST), random.Random(0)
    run(length, disturbed, 4, 0.92, 100, draw)
    assert run(length, memory_bound, 4, 0.92, 300, draw) > 0.95 * best_fixed(memory_bound, 4, 0.92)


def test_a_fixed_length_is_taken_as_it_is() -> None:
    length = DraftLength(LONGEST, fixed=3)
    assert {length.choose(rows) for rows in (1, 5, 30) for _ in range(100)} == {3}
    assert {DraftLength(1).choose(4) for _ in range(100)} == {1}


def test_a_length_chosen_from_the_past_leaves_the_tokens_as_they_are_and_one_from_the_drafts_does_not() -> None:
    """Two tokens after each other, from blocks of one or two drafts; μ and π_S do not depend on the prefix.

    From the past: two drafts if the sequence so far ended with token 0. From the drafts: two unless the first draft
    is token 0. What is counted is the first token of every block, but where a sequence's first draft is 0 the
    biased rule looks again and drafts anew. z is the deviation of token 0's share from μ in standard errors.
    """
    generator = torch.Generator().manual_seed(0)
    student_V, mu_V = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.25, 0.35])
    rows = 40_000

    def block(drafts_B: torch.Tensor, tokens_BG: torch.Tensor) -> torch.Tensor:
        shape = (rows, 2, 3)
        logp_BGV, log_mu_BGV = student_V.log().expand(shape), mu_V.log().expand(shape)
        return couple(tokens_BG, drafts_B, logp_BGV, log_mu_BGV, generator=generator).tokens_BG

    def draw() -> torch.Tensor:
        return torch.multinomial(student_V, rows * 2, replacement=True, generator=generator).view(rows, 2)

    def z(tokens: torch.Tensor) -> float:
        p, count = float(mu_V[0]), len(tokens)
        return abs(float((tokens == 0).double().mean()) - p) / (p * (1 - p) / count) ** 0.5

    first_BG = block(torch.ones(rows, dtype=torch.long), draw())
    from_past_B = torch.where(first_BG[:, 0] == 0, 2, 1)
    second_BG = block(from_past_B, draw())
    assert z(second_BG[:, 0]) < 4
    followers = second_BG[:, 1][second_BG[:, 1] >= 0]
    assert z(first_BG[:, 0]) < 4 and len(followers) > 1000

    drafts_BG = draw()
    unlikely_B = drafts_BG[:, 0] == 0  # "this block does not look good": draft another one
    again_BG = torch.where(unlikely_B[:, None], draw(), drafts_BG)
    assert z(block(torch.full((rows,), 2), again_BG)[:, 0]) > 10
