"""A model of the training step over the number of devices: rollout with its stragglers, update, weight sync, the rest.

A step is synchronous, so its time is a sum. Rollouts are simulated: an engine runs blocks, each as long as its number
of running sequences says, until its longest sequence is done; the step waits for the slowest engine. What the agent
loops do for every sequence is shared by their workers; what the trainer's own process does is serial, however many
devices there are.

Pure functions of numbers; scripts/scaling_model.py measures, fits and draws. Lengths are tokens, times seconds.
"""

import dataclasses
import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

BlockSeconds = Callable[[int], float]


@dataclass(frozen=True)
class Costs:
    """What a step costs.

    block: of an engine's block (γ drafts, one pass of the teacher), by the number of sequences in it.
    tokens_per_block: that a sequence gains by a block.
    update_fixed, update_token: of an update: once, and for a token of a device.
    gather: of an update, for collecting the shards of both models and scattering gradients, by the devices.
    hides_gather: whether that goes on while the device computes.
    sync: of a weight sync, by the devices.
    loop_fixed, loop_sequence: of the agent loops, once and for a sequence, shared by `loops` workers.
    hides_loops: whether they have cores of their own, and so work while the engines do.
    controller_fixed, controller_sequence: of the trainer's process, once and for a sequence.
    """

    block: BlockSeconds
    tokens_per_block: float
    update_fixed: float
    update_token: float
    gather: Callable[[int], float]
    hides_gather: bool
    sync: Callable[[int], float]
    loop_fixed: float
    loop_sequence: float
    loops: int
    hides_loops: bool
    controller_fixed: float
    controller_sequence: float


@dataclass(frozen=True)
class Step:
    """Seconds of a step by what they are spent on.

    waiting: of the rollouts, while the average engine is done. loops: of the agent loops, beyond the engines.
    """

    rollout: float
    waiting: float
    loops: float
    update: float
    sync: float
    controller: float

    @property
    def total(self) -> float:
        return self.rollout + self.waiting + self.loops + self.update + self.sync + self.controller


def engine_seconds(lengths: Sequence[int], block: BlockSeconds, tokens_per_block: float, max_num_seqs: int) -> float:
    """Time in which one engine generates responses of these lengths, at most max_num_seqs at one time.

    A sequence that is done gives its place to the next; all of a block's sequences wait for the block.
    """
    waiting = [math.ceil(length / tokens_per_block) for length in reversed(lengths)]
    running: list[int] = []  # the block after which each is done
    now, seconds = 0, 0.0
    while waiting or running:
        while waiting and len(running) < max_num_seqs:
            heapq.heappush(running, now + waiting.pop())
        seconds += (running[0] - now) * block(len(running))
        now = running[0]
        while running and running[0] == now:
            heapq.heappop(running)
    return seconds


def step(costs: Costs, lengths: Sequence[int], devices: int, prompt: float = 0.0, max_num_seqs: int = 256) -> Step:
    """One step of len(lengths) sequences on `devices` devices, an engine each.

    prompt: tokens of a prompt, which the update reads as well.
    """
    shares = [lengths[engine::devices] for engine in range(devices)]  # verl gives each engine as many as the others
    times = [engine_seconds(share, costs.block, costs.tokens_per_block, max_num_seqs) for share in shares]
    tokens = (sum(lengths) + prompt * len(lengths)) / devices  # verl balances the tokens of the ranks
    compute, gather = costs.update_fixed + costs.update_token * tokens, costs.gather(devices)
    mean, slowest = sum(times) / devices, max(times)
    loops = costs.loop_fixed + costs.loop_sequence * len(lengths) / costs.loops
    return Step(
        rollout=mean,
        waiting=slowest - mean,
        loops=max(0.0, loops - slowest) if costs.hides_loops else loops,
        update=max(compute, gather) if costs.hides_gather else compute + gather,
        sync=costs.sync(devices),
        controller=costs.controller_fixed + costs.controller_sequence * len(lengths),
    )


def mean_step(steps: Sequence[Step]) -> Step:
    """The average of simulated steps."""
    return Step(*np.mean([dataclasses.astuple(s) for s in steps], axis=0).tolist())


def response_lengths(count: int, median: float, sigma: float, limit: int, rng: np.random.Generator) -> list[int]:
    """Log-normal lengths, cut at `limit` as a run cuts them, at least 1 token."""
    drawn = np.exp(rng.normal(math.log(median), sigma, count))
    return np.clip(np.rint(drawn), 1, limit).astype(int).tolist()


def fit(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Non-negative coefficients of `rows` [measurements, terms] for the measured seconds.

    Relative errors count, so that short steps weigh as much as long ones.
    """
    from scipy.optimize import nnls

    weights = 1 / np.asarray(seconds)
    return nnls(np.asarray(rows, float) * weights[:, None], np.ones(len(seconds)))[0].tolist()
