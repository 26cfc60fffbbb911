"""The run report: what a run's metrics.jsonl says, as numbers (`summary`) and as one picture (`draw_report`).

    python -m verl_trb.report RUN [RUN ...] [--out PICTURE.png]

Several runs draw into the same panels, one colour a run; the picture goes into the first run's folder.
Reads files only: it works while a run goes on, and on a machine without verl or vLLM.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import yaml
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator

Metrics = list[dict[str, Any]]

COLORS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#db2777", "#0891b2", "#ca8a04", "#475569")
INK, FAINT, GRID = "#1f2937", "#6b7280", "#e5e7eb"
LOOK: Any = {
    "font.size": 10.5, "text.color": INK, "axes.edgecolor": GRID, "axes.labelcolor": FAINT,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "axes.titlesize": 12.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 27,
    "grid.color": GRID, "grid.linewidth": 0.8, "xtick.color": FAINT, "ytick.color": FAINT,
    "xtick.major.size": 0, "ytick.major.size": 0, "ytick.minor.size": 0,
    "legend.frameon": False, "legend.fontsize": 10, "lines.solid_capstyle": "round",
}  # fmt: skip
MAIN: dict[str, Any] = {"linewidth": 2.2}
MARKED: dict[str, Any] = {"linewidth": 2.2, "marker": "o", "markersize": 4.5}
THIN: dict[str, Any] = {"linewidth": 1.1, "alpha": 0.5}
DASHED: dict[str, Any] = {"linewidth": 1.4, "linestyle": (0, (4, 2))}
DOTTED: dict[str, Any] = {"linewidth": 1.6, "linestyle": (0, (1, 1.6))}


class Point(NamedTuple):
    step: int
    value: float


@dataclass(frozen=True)
class Summary:
    """A run in a few numbers; `None` where the run did not record the metric.

    Accuracies and acceptance are fractions, the reverse KL is in nats per token, times are in seconds.
    `acceptance` is the mean over the warm-up (ε > 0); `total_seconds` covers training steps and validations.
    """

    steps: int
    accuracy_first: Point | None
    accuracy_last: Point | None
    accuracy_best: Point | None
    reverse_kl_first: Point | None
    reverse_kl_last: Point | None
    acceptance: float | None
    step_seconds: float | None
    total_seconds: float | None
    total_tokens: int | None


def read_metrics(run_dir: Path) -> Metrics:
    """The steps of `run_dir`/metrics.jsonl, sorted by step. Raises `ValueError` if there are none.

    A killed run leaves half a line and, once resumed, repeats the steps since its last checkpoint. Half a
    line is ignored; of a value written twice the last one counts; steps past the resumption are forgotten.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.parent.is_dir():
        raise ValueError(f"{run_dir} is not a run folder: there is no such folder.")
    if not path.is_file():
        raise ValueError(f"{run_dir} has no metrics.jsonl: no step of it was finished yet.")
    steps: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            # Objects are flat: the last "{" starts the last one, also behind the half line of a killed run.
            metrics = json.loads(line[max(line.rfind("{"), 0) :])
            step = int(metrics["step"])
        except (ValueError, TypeError, KeyError):
            continue
        steps = {known: values for known, values in steps.items() if known <= step}
        steps[step] = {**steps.get(step, {}), **metrics, "step": step}
    if not steps:
        raise ValueError(f"{path} holds no finished step yet: wait for the first one and try again.")
    return [steps[step] for step in sorted(steps)]


def points(metrics: Metrics, key: str) -> list[Point]:
    """The steps at which `key` was recorded as a finite number."""
    values = ((row["step"], row.get(key)) for row in metrics)
    return [Point(int(s), float(v)) for s, v in values if isinstance(v, int | float) and math.isfinite(v)]


def guided(metrics: Metrics) -> Metrics:
    """The steps in which the teacher verifies the student's drafts: their ε is not 0, or the policy has none."""
    return [row for row in metrics if "trb/acceptance" in row and row.get("trb/epsilon") != 0]


def bounded(metrics: Metrics) -> bool:
    """Whether a trust region (ε > 0) bounds the rollouts of some step."""
    return any(p.value > 0 for p in points(metrics, "trb/epsilon"))


def guidance_end(metrics: Metrics) -> int | None:
    """The first step with ε = 0 after guided ones: from here on the student samples alone."""
    last = max((row["step"] for row in guided(metrics)), default=None)
    return next((p.step for p in points(metrics, "trb/epsilon") if last is not None and p.step > last), None)


def summary(metrics: Metrics) -> Summary:
    """The numbers a user wants first (see `Summary`)."""
    accuracy, loss = points(metrics, "val/accuracy"), points(metrics, "trb/reverse_kl")
    seconds, testing, tokens, accepted = (
        [p.value for p in points(rows, key)]
        for rows, key in (
            (metrics, "timing_s/step"),
            (metrics, "timing_s/testing"),
            (metrics, "perf/total_num_tokens"),
            (guided(metrics), "trb/acceptance"),
        )
    )
    return Summary(
        steps=int(metrics[-1]["step"]) if metrics else 0,
        accuracy_first=accuracy[0] if accuracy else None,
        accuracy_last=accuracy[-1] if accuracy else None,
        accuracy_best=max(accuracy, key=lambda p: p.value, default=None),
        reverse_kl_first=loss[0] if loss else None,
        reverse_kl_last=loss[-1] if loss else None,
        acceptance=sum(accepted) / len(accepted) if accepted else None,
        step_seconds=sum(seconds) / len(seconds) if seconds else None,
        total_seconds=sum(seconds + testing) if seconds else None,
        total_tokens=int(sum(tokens)) if tokens else None,
    )


def run_label(run_dir: Path) -> str:
    """What a run is called in the picture: its policy from config.yaml, or else the name of its folder."""
    try:
        trb = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))["trb"]
        policy, trb_label = str(trb["policy"]), f"TRB ε₀={float(trb['epsilon']):g} K={trb['warmup_steps']}"
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return run_dir.resolve().name
    name = trb.get("method") or policy.rpartition(":")[2]
    return {"student": "vanilla OPD (student rollouts)", "trb": trb_label}.get(policy, name)


def draw_report(run_dirs: Sequence[Path], out: Path) -> None:
    """Writes the picture of some runs (PNG, 2400×1600) to `out`. Raises `ValueError` as `read_metrics`."""
    runs, labels = [read_metrics(run_dir) for run_dir in run_dirs], [run_label(Path(p)) for p in run_dirs]
    names = []
    for run, label, run_dir in zip(runs, labels, run_dirs, strict=True):
        name = label if labels.count(label) == 1 else Path(run_dir).resolve().name
        accuracy = points(run, "val/accuracy")
        span = f"   {accuracy[0].value:.1%} → {accuracy[-1].value:.1%}" if len(accuracy) > 1 else ""
        names.append(name + span)
    # The figure object instead of pyplot: no global state, and Agg whatever backend the user has configured.
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(12, 8), dpi=200, facecolor="white")
        FigureCanvasAgg(figure)
        panels = figure.subplots(2, 2).flat
        widths = sorted((len(name) + 7 for name in names), reverse=True)  # in characters, 133 to a line
        columns = max(c for c in (1, 2, 3) if c == 1 or (c <= len(runs) and sum(widths[:c]) <= 133))
        top = 0.83 - 0.035 * math.ceil(len(runs) / columns)
        figure.subplots_adjust(left=0.065, right=0.94, top=top, bottom=0.07, wspace=0.27, hspace=0.5)
        for panel, draw in zip(panels, (_accuracy, _trust_region, _speculation, _loss), strict=True):
            draw(panel, runs)
        title = "Trust-region behavior blending" if any(map(bounded, runs)) else "On-policy distillation"
        figure.text(0.065, 0.962, title, fontsize=17, fontweight="bold", va="center")
        handles = [Line2D([], [], color=_color(i), linewidth=3.5) for i in range(len(runs))]
        figure.legend(handles, names, loc="upper left", bbox_to_anchor=(0.058, 0.94), ncols=columns,
                      fontsize=11, handlelength=1.4, columnspacing=2.5)  # fmt: skip
        out = Path(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = out.with_name(out.name + ".part")  # a viewer never sees half a picture
        figure.savefig(unfinished, format="png")
        unfinished.replace(out)


def _accuracy(panel: Axes, runs: Sequence[Metrics]) -> None:
    for i, run in enumerate(runs):
        _line(panel, i, _smooth(panel, i, points(run, "reward/mean")), THIN)
        _line(panel, i, points(run, "val/accuracy"), MARKED)
    values = [p.value for run in runs for key in ("reward/mean", "val/accuracy") for p in points(run, key)]
    if values and 0 <= min(values) and max(values) <= 1:
        panel.set_ylim(bottom=0)
        panel.yaxis.set_major_formatter(_percent)
    _finish(panel, runs, "Accuracy", {"validation": MARKED, "reward of the rollouts": THIN} if values else {})


def _trust_region(panel: Axes, runs: Sequence[Metrics]) -> None:
    blended = [i for i, run in enumerate(runs) if bounded(run)]
    if blended:
        right = _second_axis(panel, "β")
        right.set_ylim(0, 1.05)
    for i in blended:
        mean, most = points(runs[i], "trb/kl/mean"), dict(points(runs[i], "trb/kl/max"))
        band = [p for p in mean if p.step in most]
        steps, low, high = [p.step for p in band], [p.value for p in band], [most[p.step] for p in band]
        panel.fill_between(steps, low, high, color=_color(i), alpha=0.13, linewidth=0)
        _line(panel, i, points(runs[i], "trb/epsilon"), DASHED)
        _line(panel, i, mean, MAIN)
        _line(right, i, points(runs[i], "trb/beta/mean"), DOTTED)
    panel.set_ylim(bottom=0)
    panel.set_ylabel("nats per token")
    key = {"budget ε": DASHED, "KL(μ‖$π_S$), mean to max": MAIN, "mean β (right)": DOTTED} if blended else {}
    _finish(panel, runs, "Trust region", key, guided_only=True)


def _speculation(panel: Axes, runs: Sequence[Metrics]) -> None:
    # Only while ε > 0: later the teacher verifies nothing, and that every draft survives says nothing.
    verified = any(points(guided(run), "trb/acceptance") for run in runs)
    if verified:
        right = _second_axis(panel, "tokens per teacher pass")
        for i, run in enumerate(runs):
            _line(panel, i, points(guided(run), "trb/acceptance"), MAIN)
            _line(right, i, points(guided(run), "trb/tokens_per_teacher_pass"), DOTTED)
        panel.set_ylim(top=1)
        right.set_ylim(0, 1.2 * right.get_ylim()[1])
        panel.yaxis.set_major_formatter(_percent)
    panel.set_ylabel("accepted drafts")
    key = {"acceptance": MAIN, "tokens per teacher pass (right)": DOTTED} if verified else {}
    _finish(panel, runs, "Speculative rollouts", key, guided_only=True)


def _loss(panel: Axes, runs: Sequence[Metrics]) -> None:
    for i, run in enumerate(runs):
        _line(panel, i, _smooth(panel, i, points(run, "trb/reverse_kl")), MAIN)
    values = [p.value for run in runs for p in points(run, "trb/reverse_kl")]
    if values and min(values) > 0 and max(values) > 10 * min(values):
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.yaxis.set_minor_formatter(lambda value, _: "")
    panel.set_ylabel("nats per token")
    _finish(panel, runs, "Reverse KL", {"student against teacher, the loss": MAIN} if values else {})


def _color(run: int) -> str:
    return COLORS[run % len(COLORS)]


def _percent(value: float, _: float) -> str:
    return f"{100 * value:g}%"


def _line(panel: Axes, run: int, values: Sequence[Point], style: dict[str, Any]) -> None:
    style = MARKED if len(values) == 1 else style  # a line of one point would not show
    panel.plot([p.step for p in values], [p.value for p in values], color=_color(run), **style)


def _smooth(panel: Axes, run: int, values: list[Point]) -> list[Point]:
    """One batch is noisy: in a long run a moving mean, with the single steps drawn faintly behind it."""
    half = len(values) // 50
    if not half:
        return values
    _line(panel, run, values, {"linewidth": 0.7, "alpha": 0.25})
    windows = [values[max(i - half, 0) : i + half + 1] for i in range(len(values))]
    return [Point(values[i].step, sum(p.value for p in w) / len(w)) for i, w in enumerate(windows)]


def _second_axis(panel: Axes, name: str) -> Axes:
    right = panel.twinx()
    right.grid(False)
    right.set_ylabel(name)
    return right


def _finish(panel: Axes, runs: Sequence[Metrics], title: str, key: dict[str, Any], guided_only: bool = False) -> None:
    """Title, x axis, the ends of the warm-ups, and a key to the kinds of line (the colours are the runs)."""
    panel.set_title(title)
    panel.set_xlabel("step")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    ends = [(i, end) for i, run in enumerate(runs) if (end := guidance_end(run)) is not None]
    last: float = max(1, *(run[-1]["step"] for run in runs))
    if guided_only and ends and len(ends) == sum(map(bool, map(guided, runs))):
        last = min(last, 1.35 * max(end for _, end in ends))  # nothing happens here later
    panel.set_xlim(-0.02 * last, 1.02 * last)
    if not key:
        text = f"no {title.lower()}" if guided_only else "nothing recorded"
        panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", va="center", color=FAINT)
        panel.set_yticks([])
        panel.set_ylabel("")
        return
    for i, end in ends:
        panel.axvline(end, color=_color(i), linewidth=0.9, alpha=0.6, zorder=1)
    if ends and title == "Accuracy":
        panel.annotate("warm-up ends", (ends[0][1], 0), (4, 6), xycoords=("data", "axes fraction"),
                       textcoords="offset points", fontsize=9, color=FAINT)  # fmt: skip
    handles = [Line2D([], [], color=FAINT, label=label, **style) for label, style in key.items()]
    panel.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.012, 1.01), ncols=len(key),
                 borderpad=0, handlelength=1.7, columnspacing=1.6, labelcolor=FAINT)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m verl_trb.report", description="Draw runs into one picture.")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folder (with a metrics.jsonl)")
    parser.add_argument("--out", type=Path, help="the picture; default: report.png in the first run's folder")
    args = parser.parse_args(argv)
    out = args.out or args.runs[0] / "report.png"
    try:
        draw_report(args.runs, out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename or out}: {error.strerror or error}.", file=sys.stderr)
        return 1
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
