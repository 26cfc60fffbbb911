"""The step's model against a simulation block by block, and its limits."""

import numpy as np
import pytest

from verl_trb.planning.scaling import Costs, engine_seconds, fit, mean_step, response_lengths, step


def naive_engine(lengths, block, tokens_per_block, max_num_seqs):
    """One block after the other."""
    left = [-(-length // tokens_per_block) for length in lengths]
    seconds, queue, running = 0.0, left[:], []
    while queue or running:
        while queue and len(running) < max_num_seqs:
            running.append(queue.pop(0))
        seconds += block(len(running))
        running = [blocks - 1 for blocks in running if blocks > 1]
    return seconds


@pytest.mark.parametrize("max_num_seqs", [1, 3, 7, 100])
def test_engine_is_its_blocks(max_num_seqs: int):
    lengths = np.random.default_rng(1).integers(1, 40, 30).tolist()
    block = lambda n: 0.3 + 0.01 * n**1.5  # noqa: E731
    expected = naive_engine(lengths, block, 3, max_num_seqs)
    assert engine_seconds(lengths, block, 3, max_num_seqs) == pytest.approx(expected, rel=1e-12)


def costs(**changed) -> Costs:
    given = {
        "block": lambda n: 1.0,
        "tokens_per_block": 1.0,
        "update_fixed": 2.0,
        "update_token": 0.5,
        "gather": lambda devices: 3.0 * (devices > 1),
        "hides_gather": False,
        "sync": lambda devices: 0.25,
        "loop_fixed": 0.5,
        "loop_sequence": 2.0,
        "loops": 4,
        "hides_loops": False,
        "controller_fixed": 1.0,
        "controller_sequence": 0.125,
    }
    return Costs(**{**given, **changed})


def test_parts_of_a_step():
    """Four sequences on two devices, by hand: engines get 5, 3 and 2, 4 tokens, so 5 and 4 blocks."""
    got = step(costs(), [5, 2, 3, 4], devices=2, prompt=1)
    assert (got.rollout, got.waiting) == (4.5, 0.5)
    assert got.update == 2 + 0.5 * (14 + 4) / 2 + 3
    assert (got.loops, got.sync, got.controller) == (2.5, 0.25, 1.5)
    assert got.total == 4.5 + 0.5 + 2.5 + got.update + 0.25 + 1.5
    assert step(costs(hides_loops=True), [5, 2, 3, 4], 2, 1).loops == 0
    assert step(costs(hides_loops=True, loops=1), [5, 2, 3, 4], 2, 1).loops == 0.5 + 8 - 5
    assert step(costs(hides_gather=True), [5, 2, 3, 4], 2, 1).update == 2 + 0.5 * 9
    assert mean_step([got, got]) == got


def test_the_longest_response_bounds_a_step():
    """However many devices: the blocks of the longest sequence stay, and so does the trainer's own work."""
    lengths = response_lengths(64, 100, 0.6, 400, np.random.default_rng(0))
    for devices in (1, 4, 64):
        got = step(costs(), lengths, devices)
        assert got.rollout + got.waiting == max(lengths) and got.controller == 1 + 0.125 * 64


def test_lengths_are_cut():
    drawn = response_lengths(4000, 100, 0.6, 200, np.random.default_rng(0))
    assert min(drawn) >= 1 and max(drawn) == 200 and abs(np.median(drawn) - 100) < 5


def test_fit_finds_the_coefficients():
    rows = [[1, n, n * n] for n in (1, 2, 5, 9)]
    assert fit(rows, [2 + 3 * n for _, n, _ in rows]) == pytest.approx([2, 3, 0], abs=1e-9)
