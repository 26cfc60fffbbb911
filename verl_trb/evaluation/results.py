"""What an evaluation found: numbers of every model on every set, as JSON, as a table, and as a picture over steps."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from verl_trb.evaluation.estimators import Interval, bootstrap, passes
from verl_trb.evaluation.models import Candidate
from verl_trb.evaluation.samples import Sample

MEAN = "mean"  # of the sets


@dataclass(frozen=True)
class Score:
    """One model on one set. passes: pass@k by k, each with its interval; truncated: share of responses cut off."""

    problems: int
    n: int
    passes: dict[int, Interval]
    values: dict[int, np.ndarray]
    mean_tokens: float
    truncated: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "problems": self.problems,
            "n": self.n,
            **{f"pass@{k}": interval._asdict() for k, interval in self.passes.items()},
            "mean_tokens": self.mean_tokens,
            "truncated": self.truncated,
        }


def score(samples: Mapping[tuple[str, int], Sample], ids: Sequence[str], n: int, ks: Sequence[int], seed: int) -> Score:
    """Of the first n samples of each problem, all of which must be there. A sample is right at a score of 1."""
    mine = {id_: [samples[id_, index] for index in range(n)] for id_ in ids}
    flat = [sample for of_one in mine.values() for sample in of_one]
    counts = [(n, sum(sample.score >= 1.0 for sample in of_one)) for of_one in mine.values()]
    values = {k: passes(counts, k) for k in ks}
    return Score(
        problems=len(ids),
        n=n,
        passes={k: bootstrap([values[k]], seed=seed) for k in ks},
        values=values,
        mean_tokens=float(np.mean([sample.tokens for sample in flat])),
        truncated=float(np.mean([sample.finish == "length" for sample in flat])),
    )


def means(scores: Mapping[str, Score], seed: int) -> dict[int, Interval]:
    """pass@k averaged over sets, each set counting the same."""
    ks = next(iter(scores.values())).passes
    return {k: bootstrap([score.values[k] for score in scores.values()], seed=seed) for k in ks}


def differences(first: Mapping[str, Score], other: Mapping[str, Score], seed: int) -> dict[str, Interval]:
    """pass@1 of `other` less that of `first`, by set and for their mean: problem by problem, so that what makes a
    problem hard for both does not widen the interval.
    """
    values = {name: other[name].values[1] - first[name].values[1] for name in first}
    found = {name: bootstrap([one], seed=seed) for name, one in values.items()}
    return {**found, MEAN: bootstrap(list(values.values()), seed=seed)}


Results = Sequence[tuple[Candidate, dict[str, Score]]]


def as_json(results: Results, seed: int) -> list[dict[str, Any]]:
    """One record a model; differences are from the first."""
    first = results[0][1]
    return [
        {
            "model": candidate.name,
            "path": candidate.path,
            "run": candidate.run,
            "step": candidate.step,
            "sets": {name: score.as_dict() for name, score in scores.items()},
            MEAN: {f"pass@{k}": interval._asdict() for k, interval in means(scores, seed).items()},
            "difference": {name: i._asdict() for name, i in differences(first, scores, seed).items()},
        }
        for candidate, scores in results
    ]


def table(results: Results, seed: int) -> Table:
    """pass@1 with its interval, then the largest k asked for, of each set; the mean of several sets last."""
    names = list(results[0][1])
    sizes = {name: f"{score.problems} × {score.n}" for name, score in results[0][1].items()}
    shown = Table(title="accuracy in percent, with 95% intervals over problems", title_justify="left", pad_edge=False)
    shown.add_column("model", no_wrap=True)
    ks = _shown(results[0][1][names[0]])
    for name in names:
        for k in ks:
            shown.add_column(f"{name}\n{sizes[name]}\npass@{k}", justify="right", no_wrap=True)
        shown.add_column("tokens\ncut off", justify="right", no_wrap=True)
    if len(names) > 1:
        for k in ks:
            shown.add_column(f"mean\n\npass@{k}", justify="right", no_wrap=True)
    for candidate, scores in results:
        cells = []
        for name in names:
            cells += [percent(scores[name].passes[k]) for k in ks]
            cells.append(f"{scores[name].mean_tokens:,.0f}\n{scores[name].truncated:.0%}")
        if len(names) > 1:
            mean = means(scores, seed)
            cells += [percent(mean[k]) for k in ks]
        shown.add_row(candidate.name, *cells)
    return shown


def markdown(results: Results, seed: int) -> str:
    """The same as a Markdown table, a row for each model and set, with the differences from the first model."""
    first, names = results[0][1], list(results[0][1])
    ks = list(first[names[0]].passes)
    heads = ["model", "set", "problems × samples", *(f"pass@{k}" for k in ks), f"less {results[0][0].name}'s pass@1"]
    lines = ["Accuracy in percent, with 95% bootstrap intervals over problems.", ""]
    lines += [f"| {' | '.join(heads)} | tokens | cut off |", f"|{'---|' * (len(heads) + 2)}"]
    for candidate, scores in results:
        less = differences(first, scores, seed)
        rows: dict[str, tuple[dict[int, Interval], str, Score | None]] = {
            name: (one.passes, f"{one.problems} × {one.n}", one) for name, one in scores.items()
        }
        if len(names) > 1:
            rows[MEAN] = means(scores, seed), "", None
        for name, (passed, size, own) in rows.items():
            cells = [percent(passed[k]) for k in ks]
            cells.append("" if scores is first else percent(less[name], sign="+"))
            cells += [f"{own.mean_tokens:,.0f}", f"{own.truncated:.0%}"] if own else ["", ""]
            lines.append(f"| {candidate.name} | {name} | {size} | {' | '.join(cells)} |".replace("\n", " "))
    return "\n".join(lines) + "\n"


def percent(interval: Interval, sign: str = "") -> str:
    """A mean above its interval; `sign` "+" for differences."""
    mean, low, high = (format(100 * value, f"{sign}.1f") for value in interval)
    return f"{mean}\n[{low}, {high}]"


def _shown(score: Score) -> list[int]:
    ks = list(score.passes)
    return [ks[0], ks[-1]] if len(ks) > 1 else ks


def draw(results: Results, seed: int, file: Path) -> None:
    """pass@1 against the step with its interval as a band, a panel a set; models without a step are level lines.

    Without any step: a point and its interval for each model.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from verl_trb.report.panels import LOOK

    names = list(results[0][1])
    panels = {name: [(candidate, scores[name].passes[1]) for candidate, scores in results] for name in names}
    if len(names) > 1:
        panels[MEAN] = [(candidate, means(scores, seed)[1]) for candidate, scores in results]
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    curves = any(candidate.step is not None for candidate, _ in results)
    height = 3.9 if curves else 1.6 + 0.42 * len(results)
    with mpl.rc_context({**LOOK, "axes.titlepad": 12}):
        figure = Figure(
            figsize=(max(5.2 * columns, 7), height * rows), dpi=150, facecolor="white", layout="constrained"
        )
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False).flat
        for axis, (name, points) in zip(axes, panels.items(), strict=False):
            (_draw_curves if curves else _draw_points)(axis, points)
            size = "" if name == MEAN else f" ({results[0][1][name].problems} problems × {results[0][1][name].n})"
            axis.set_title(f"{name}{size}")
        for axis in list(figure.axes)[len(panels) :]:
            axis.remove()
        figure.supylabel("pass@1, %, with its 95% interval" if curves else "", fontsize=10.5, color="#6b7280")
        if curves:
            handles, labels = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))
        figure.savefig(file)


def _draw_curves(axis: Any, points: Sequence[tuple[Candidate, Interval]]) -> None:
    from verl_trb.report.panels import COLORS, DASHED, MARKED

    curves: dict[str, list[tuple[int, Interval]]] = defaultdict(list)
    for candidate, interval in points:
        if candidate.step is not None and candidate.run is not None:
            curves[candidate.run].append((candidate.step, interval))
    colors = iter(COLORS * len(points))
    for run, curve in curves.items():
        color = next(colors)
        steps, intervals = zip(*sorted(curve, key=lambda point: point[0]), strict=True)
        axis.plot(steps, [100 * i.mean for i in intervals], color=color, label=run, **MARKED)
        low, high = [100 * i.low for i in intervals], [100 * i.high for i in intervals]
        if len(steps) > 1:
            axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        else:
            axis.vlines(steps, low, high, color=color, alpha=0.4)
    for candidate, interval in points:
        if candidate.step is None:
            color = next(colors)
            axis.axhline(100 * interval.mean, color=color, label=candidate.name, **DASHED)
            axis.axhspan(100 * interval.low, 100 * interval.high, color=color, alpha=0.07, linewidth=0)
    axis.set_xlabel("step")
    axis.set_ylim(bottom=0)


def _draw_points(axis: Any, points: Sequence[tuple[Candidate, Interval]]) -> None:
    from verl_trb.report.panels import COLORS

    for place, ((_, interval), color) in enumerate(zip(points, COLORS * len(points), strict=False)):
        error = [[100 * (interval.mean - interval.low)], [100 * (interval.high - interval.mean)]]
        axis.errorbar(100 * interval.mean, place, xerr=error, color=color, fmt="o", capsize=4)
    axis.set_yticks(range(len(points)), [candidate.name for candidate, _ in points])
    axis.set_ylim(len(points) - 0.5, -0.5)
    axis.set_xlim(left=0)
    axis.set_xlabel("pass@1, %, with its 95% interval")
