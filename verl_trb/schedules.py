"""Schedules: pure functions of the training step, so that resuming a run needs no state of theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence


def piecewise_linear(step: float, points: Sequence[tuple[float, float]]) -> float:
    """The value at `step` of the line through (step, value) points; constant before the first and after the
    last.

    Raises ValueError if there is no point or their steps do not increase.
    """
    if not points:
        raise ValueError("A schedule needs at least one (step, value) point.")
    if any(left[0] >= right[0] for left, right in zip(points, points[1:], strict=False)):
        raise ValueError(f"The steps of a schedule must increase, but the points are {list(points)}.")
    if step <= points[0][0]:
        return float(points[0][1])
    for (step0, value0), (step1, value1) in zip(points, points[1:], strict=False):
        if step < step1:
            return value0 + (value1 - value0) * (step - step0) / (step1 - step0)
    return float(points[-1][1])


def warmup_factor(updates: int, warmup_steps: int, shape: str) -> float:
    """The share of the full learning rate after so many optimizer updates: from 0 to 1 over `warmup_steps`, then 1.

    shape: "linear", verl's, or "cosine", half a period of it (arXiv 2605.31159: a 15-step cosine warm-up).
    """
    if updates >= warmup_steps:
        return 1.0
    share = updates / warmup_steps
    return share if shape == "linear" else (1 - math.cos(math.pi * share)) / 2


def annealed_epsilon(step: int, epsilon: float, warmup_steps: int) -> float:
    """The budget of a training step: epsilon_k = epsilon (1 - k / K) for k < K, then exactly 0.

    step: training steps counted from 1, as verl does. The paper (arXiv 2605.31159) does not say where k
      starts; here k = step - 1, so that the first step has the whole epsilon_0 and exactly the first K =
      warmup_steps steps are blended.
    epsilon: epsilon_0 in nats per token.

    Raises ValueError for a step < 1, an epsilon that is negative or not finite, warmup_steps < 1.
    """
    if step < 1:
        raise ValueError(f"Training steps are counted from 1, but the step is {step}.")
    if not 0.0 <= epsilon < math.inf:
        raise ValueError(f"epsilon must be finite and at least 0 nats per token, but is {epsilon}.")
    if warmup_steps < 1:
        raise ValueError(f"warmup_steps must be at least 1, but is {warmup_steps}; for no warm-up set epsilon to 0.")
    return piecewise_linear(step - 1, [(0, epsilon), (warmup_steps, 0.0)])
