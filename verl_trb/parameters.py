"""Numbers that a method takes from the configuration: their ranges, and their values at a training step.

A value is a number or a schedule, a list of [step, value] points with steps counted from 1 (schedules.py), so it is
a pure function of the step. Imports nothing but the standard library and schedules.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from verl_trb.schedules import piecewise_linear


@dataclass(frozen=True)
class Parameter:
    """The finite numbers in [low, high]; `open` leaves both ends out."""

    low: float = -math.inf
    high: float = math.inf
    open: bool = False

    def takes(self, value: float) -> bool:
        inside = self.low < value < self.high if self.open else self.low <= value <= self.high
        return math.isfinite(value) and inside

    def __str__(self) -> str:
        if math.isfinite(self.high):
            return f"a number {'strictly ' if self.open else ''}between {self.low:g} and {self.high:g}"
        return "a number" if self.low == -math.inf else f"a number {'>' if self.open else '>='} {self.low:g}"


def value_at(value: float | list[list[float]], step: int) -> float:
    """A number, or a schedule of [step, value] points, at a training step."""
    return float(piecewise_linear(step, [(s, v) for s, v in value]) if isinstance(value, list) else value)


def check_value(key: str, value: Any, parameter: Parameter) -> None:
    """Raises ValueError, one sentence that names `key`, if `value` is neither a number nor a schedule of them in the
    parameter's range.
    """
    numbers = [value]
    if isinstance(value, list):
        if not all(isinstance(point, list) and len(point) == 2 and all(map(_is_number, point)) for point in value):
            raise ValueError(f"{key} must be a number or a list of [step, value] points, got {value}.")
        try:
            value_at(value, 1)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        numbers = [v for _, v in value]
    for number in numbers:
        if not _is_number(number) or not parameter.takes(number):
            raise ValueError(f"{key} must be {parameter}, got {number!r}.")


def describe(value: float | list[list[float]]) -> str:
    """A number or a schedule for the screen."""
    if isinstance(value, list):
        return " → ".join(f"{v:g} at step {s:g}" for s, v in value)
    return f"{value:g}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
