"""Several methods, each with several seeds, as numbers: means with standard errors, and paired differences.

Pure functions of learning curves; compare.py makes the runs and draws. A curve is a metric over steps. Standard
errors are over seeds; a difference is taken seed by seed, because runs of one seed share models and data, and its
95% confidence interval is Student's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student_t

Curve = Mapping[int, float]  # step -> value


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; `error` is its standard error, NaN for a single seed; `margin` half of the 95% interval."""

    mean: float
    error: float
    margin: float
    seeds: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, standard error and 95% margin of independent values. Raises ValueError if there are none."""
    if not values:
        raise ValueError("There are no values to average.")
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return Estimate(mean, error, float(student_t.ppf(0.975, n - 1)) * error, n)


def area(curve: Curve) -> float:
    """Mean height of a curve between its first and last step, by trapezoids: the area under it over its length."""
    steps = sorted(curve)
    if len(steps) < 2:
        return curve[steps[0]]
    pairs = zip(steps, steps[1:], strict=False)
    return math.fsum((curve[a] + curve[b]) / 2 * (b - a) for a, b in pairs) / (steps[-1] - steps[0])


def common_steps(curves: Sequence[Curve]) -> list[int]:
    """The steps that every curve has, ascending."""
    return sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []


def measures(curve: Curve, steps: Sequence[int], best: bool = False) -> dict[str, float]:
    """What is compared of one run: its values at `steps`, the last of them, and the area.

    best: in place of the last value the highest one, the checkpoint that this very metric would choose (optimistic).
    """
    values = {f"step {step}": curve[step] for step in steps}
    last = max(curve[step] for step in steps) if best else curve[steps[-1]]
    return {**values, "best checkpoint" if best else "final": last, "area": area({s: curve[s] for s in steps})}


@dataclass(frozen=True)
class Row:
    """One method: each measure's estimate, and its difference from the baseline (absent for the baseline)."""

    method: str
    measures: dict[str, Estimate]
    differences: dict[str, Estimate]


def compare(curves: Mapping[str, Mapping[int, Curve]], baseline: str, best: bool = False) -> list[Row]:
    """Every method's row, in the order given.

    curves: method -> seed -> curve. Methods are measured at the steps that all curves have; differences use the
    seeds that a method shares with the baseline.

    Raises ValueError if the baseline is missing, a method has no runs, or the curves share no step.
    """
    if baseline not in curves:
        raise ValueError(f"The baseline {baseline!r} is not among the methods {', '.join(curves)}.")
    if empty := [method for method, runs in curves.items() if not runs]:
        raise ValueError(f"There are no finished runs of {', '.join(empty)}.")
    steps = common_steps([curve for runs in curves.values() for curve in runs.values()])
    if not steps:
        raise ValueError("The runs have no validation step in common.")
    measured = {
        method: {seed: measures(curve, steps, best) for seed, curve in runs.items()} for method, runs in curves.items()
    }
    rows = []
    for method, runs in measured.items():
        names = list(next(iter(runs.values())))
        own = {name: estimate([run[name] for run in runs.values()]) for name in names}
        shared = sorted(runs.keys() & measured[baseline].keys()) if method != baseline else []
        differences = {
            name: estimate([runs[seed][name] - measured[baseline][seed][name] for seed in shared])
            for name in names
            if shared
        }
        rows.append(Row(method, own, differences))
    return rows


def select(curves: Mapping[str, Mapping[int, Curve]], best: bool = False) -> dict[str, str]:
    """Of each family, the setting with the highest mean: family -> method.

    The family of a method is its name up to the first "/" (`trb/eps0.05` and `trb/eps0.1` are settings of `trb`).
    To be called with the metric of a split that is not the one reported on.
    """
    chosen: dict[str, tuple[float, str]] = {}
    steps = common_steps([curve for runs in curves.values() for curve in runs.values()])
    for method, runs in curves.items():
        name = "best checkpoint" if best else "final"
        mean = estimate([measures(curve, steps, best)[name] for curve in runs.values()]).mean
        family = method.partition("/")[0]
        chosen[family] = max(chosen.get(family, (-math.inf, "")), (mean, method))
    return {family: method for family, (_, method) in chosen.items()}


def markdown(rows: Sequence[Row], scale: float = 100) -> str:
    """The table, mean ± standard error; differences with their 95% interval. `scale` 100: in percent."""

    def number(value: float, form: str) -> str:
        return "–" if math.isnan(value) else format(scale * value, form)

    names = list(rows[0].measures)
    lines = [f"| method | seeds | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    for row in rows:
        cells = [f"{number(m.mean, '.1f')} ± {number(m.error, '.1f')}" for m in row.measures.values()]
        lines.append(f"| {row.method} | {next(iter(row.measures.values())).seeds} | {' | '.join(cells)} |")
    paired = [row for row in rows if row.differences]
    if paired:
        lines += ["", "Paired differences from the baseline, with 95% confidence intervals:", ""]
        lines += [f"| method | pairs | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    for row in paired:
        cells = [f"{number(d.mean, '+.1f')} ± {number(d.margin, '.1f')}" for d in row.differences.values()]
        lines.append(f"| {row.method} | {next(iter(row.differences.values())).seeds} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
