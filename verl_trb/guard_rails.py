"""Warnings about numbers: engine and trainer that disagree, and spikes and collapses during training.

Pure functions of the metrics' history, so that what was warned about can be found again in metrics.jsonl. The
thresholds are the fields of `trb.warn` (config.py).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

Metrics = Mapping[str, Any]

WINDOW = 20  # steps before the present one that it is compared with
LEAST = 5  # fewer of them say nothing about what is usual
GRAD_NORM, LENGTH = "actor/grad_norm", "response_length/mean"  # verl's names
ENTROPY, KL, ENDED = "trb/student_entropy", "trb/reverse_kl", "trb/eos_rate"


def warnings(history: Sequence[Metrics], limits: Any) -> list[tuple[str, str]]:
    """What is wrong with the last step of `history`: (what, sentence) pairs.

    what: a short name, so that the same thing is not said at every step. limits: `trb.warn`.
    """
    if not history:
        return []
    last, before = history[-1], history[-1 - WINDOW : -1]
    found = [
        _mismatch(last, limits.mismatch),
        _not_finite(last),
        _spike(last, before, KL, "the reverse KL", limits.spike),
        _spike(last, before, GRAD_NORM, "the gradient's norm", limits.spike),
        _collapse(last, before, ENTROPY, "the student's entropy", limits.collapse),
        _collapse(last, before, LENGTH, "the mean response length", limits.collapse),
        _endless(last, limits.eos_rate),
    ]
    return [warning for warning in found if warning is not None]


def _mismatch(last: Metrics, limit: float) -> tuple[str, str] | None:
    """Engine and trainer give the same tokens different log-probabilities of the student."""
    engine, trainer = _number(last, "trb/log_ratio"), _number(last, "trb/log_ratio_trainer")
    if engine is None or trainer is None or abs(engine - trainer) <= limit:
        return None
    return "mismatch", (
        f"engine and trainer disagree on the student by {abs(engine - trainer):.2g} nats per token (trb.warn.mismatch="
        f"{limit:g}): a vocabulary mask in one of them only, different dtypes, or weights that did not arrive"
    )


def _not_finite(last: Metrics) -> tuple[str, str] | None:
    """verl leaves out an update whose gradient is not finite; metrics.jsonl has no value then."""
    if last.get("trb/skipped_updates", 0) == 0:
        return None
    return "not finite", (
        "the gradient was not finite and the update was left out: look for NaN in the models' weights, or a learning "
        "rate that is too high"
    )


def _spike(last: Metrics, before: Sequence[Metrics], name: str, words: str, factor: float) -> tuple[str, str] | None:
    now, usual = _number(last, name), _usual(before, name)
    if now is None or usual is None or not abs(now) > factor * abs(usual) > 0:
        return None
    return f"spike of {name}", (
        f"{words} jumped to {now:.3g}, {abs(now / usual):.0f} times what it was in the last {len(before)} steps "
        f"(trb.warn.spike={factor:g}): if it stays, lower actor_rollout_ref.actor.optim.lr"
    )


def _collapse(last: Metrics, before: Sequence[Metrics], name: str, words: str, share: float) -> tuple[str, str] | None:
    now, usual = _number(last, name), _usual(before, name)
    if now is None or usual is None or not now < share * usual:
        return None
    return f"collapse of {name}", (
        f"{words} fell to {now:.3g} from {usual:.3g} in the last {len(before)} steps (trb.warn.collapse={share:g}): "
        "the student may repeat itself or stop at once; look at the rollouts (trainer.rollout_data_dir=DIR)"
    )


def _endless(last: Metrics, limit: float) -> tuple[str, str] | None:
    """Nearly no response ends by itself."""
    ended = _number(last, ENDED)
    if ended is None or ended > limit:
        return None
    return "endless", (
        f"{ended:.0%} of the responses said their end, the others were cut at data.max_response_length "
        f"(trb.warn.eos_rate={limit:g}): raise that length, or check that both models' EOS are one "
        "(docs/troubleshooting.md)"
    )


def _usual(before: Iterable[Metrics], name: str) -> float | None:
    values = [value for value in (_number(step, name) for step in before) if value is not None]
    return median(values) if len(values) >= LEAST else None


def _number(metrics: Metrics, name: str) -> float | None:
    value = metrics.get(name)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
