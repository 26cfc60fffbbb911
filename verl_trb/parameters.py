"""Numbers that a policy or a loss takes from the configuration: their ranges, and their values at a training step;
and how either is found by its name.

A value is a number or a schedule, a list of [step, value] points with steps counted from 1 (schedules.py), so it is
a pure function of the step. Imports neither torch nor verl.
"""

from __future__ import annotations

import difflib
import inspect
import math
import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from verl_trb.schedules import piecewise_linear

T = TypeVar("T")


@dataclass(frozen=True)
class Parameter:
    """The values a parameter of a policy or of a loss may take: finite numbers in [low, high].

    above, below: low, high itself is excluded; whole: whole numbers only, and no schedule; student_at: the value at
    which a policy is the student, so that rollouts with it are not guided at all.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    whole: bool = False
    student_at: float | None = None

    def takes(self, value: float) -> bool:
        low = value > self.low if self.above else value >= self.low
        high = value < self.high if self.below else value <= self.high
        return math.isfinite(value) and low and high and (not self.whole or value == int(value))

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if math.isfinite(self.high):
            return f"{kind} {'strictly ' if self.above and self.below else ''}between {self.low:g} and {self.high:g}"
        return kind if self.low == -math.inf else f"{kind} {'>' if self.above else '>='} {self.low:g}"


def value_at(value: float | list[list[float]], step: int) -> float:
    """A number, or a schedule of [step, value] points, at a training step."""
    return float(piecewise_linear(step, [(s, v) for s, v in value]) if isinstance(value, list) else value)


def check_value(key: str, value: Any, parameter: Parameter) -> None:
    """Raises ValueError, one sentence that names `key`, if `value` is neither a number nor a schedule of them in the
    parameter's range.
    """
    numbers = [value]
    if isinstance(value, list) and not parameter.whole:
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


def parameters_of(
    rule: Callable[..., Any], ranges: Mapping[str, Parameter]
) -> tuple[dict[str, Parameter], dict[str, float]]:
    """The parameters of a policy or a loss, its keyword-only arguments, with the ranges given for them; and the
    defaults of those that have one.
    """
    keywords = [p for p in inspect.signature(rule).parameters.values() if p.kind is p.KEYWORD_ONLY]
    parameters = {p.name: ranges.get(p.name, Parameter()) for p in keywords}
    return parameters, {p.name: p.default for p in keywords if p.default is not p.empty}


def find(registry: Mapping[str, T], kind: str, name: str) -> T:
    """The entry of that name, or after running a file of the user's: FILE.py:NAME.

    Raises ValueError, with the names that come near, if there is none, or if the file cannot be run.
    """
    file, _, name = str(name).rpartition(":")
    if file:
        run_file(file)
    if name not in registry:
        near = difflib.get_close_matches(name, registry, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(sorted(registry))}."
        raise ValueError(f"There is no {kind} {name!r}; {hint}")
    return registry[name]


@cache
def run_file(file: str) -> None:
    """Runs a file of the user's, which registers a policy or a loss, once. Raises ValueError if it cannot be run."""
    try:
        runpy.run_path(file)
    except Exception as error:
        raise ValueError(f"{file} cannot be run: {type(error).__name__}: {error}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
