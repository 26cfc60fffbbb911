"""The report's panels: each draws one subject of some runs into matplotlib axes, one colour a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator

from verl_trb.report.metrics import TIME_PARTS, Metrics, Point, bounded, guidance_end, guided, points, time_parts

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


def accuracy(panel: Axes, runs: Sequence[Metrics]) -> None:
    for i, run in enumerate(runs):
        _line(panel, i, _smooth(panel, i, points(run, "reward/mean")), THIN)
        _line(panel, i, points(run, "val/accuracy"), MARKED)
    values = [p.value for run in runs for key in ("reward/mean", "val/accuracy") for p in points(run, key)]
    if values and 0 <= min(values) and max(values) <= 1:
        panel.set_ylim(bottom=0)
        panel.yaxis.set_major_formatter(_percent)
    _finish(panel, runs, "Accuracy", {"validation": MARKED, "reward of the rollouts": THIN} if values else {})


def trust_region(panel: Axes, runs: Sequence[Metrics]) -> None:
    blended = [i for i, run in enumerate(runs) if bounded(run)]
    if blended:
        right = _second_axis(panel, "β")
        right.set_ylim(0, 1.05)
    for i in blended:
        mean, most = points(runs[i], "trb/kl/mean"), dict(points(runs[i], "trb/kl/max"))
        band = [p for p in mean if p.step in most]
        steps, low, high = [p.step for p in band], [p.value for p in band], [most[p.step] for p in band]
        panel.fill_between(steps, low, high, color=color(i), alpha=0.13, linewidth=0)
        _line(panel, i, points(runs[i], "trb/epsilon"), DASHED)
        _line(panel, i, mean, MAIN)
        _line(right, i, points(runs[i], "trb/beta/mean"), DOTTED)
    panel.set_ylim(bottom=0)
    panel.set_ylabel("nats per token")
    key = {"budget ε": DASHED, "KL(μ‖$π_S$), mean to max": MAIN, "mean β (right)": DOTTED} if blended else {}
    _finish(panel, runs, "Trust region", key, guided_only=True)


def speculation(panel: Axes, runs: Sequence[Metrics]) -> None:
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


def loss(panel: Axes, runs: Sequence[Metrics]) -> None:
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


def entropy(panel: Axes, runs: Sequence[Metrics]) -> None:
    _pair(panel, runs, "Entropy", "nats per token", {"student": ("trb/student_entropy", MAIN),
                                                     "teacher": ("trb/teacher_entropy", DASHED)})  # fmt: skip


def teacher_logprob(panel: Axes, runs: Sequence[Metrics]) -> None:
    _pair(panel, runs, "Teacher's log-probability", "nats per token",
          {"of the rollout tokens": ("trb/teacher_logprob", MAIN)})  # fmt: skip


def lengths(panel: Axes, runs: Sequence[Metrics]) -> None:
    _pair(panel, runs, "Response length", "tokens", {"mean": ("response_length/mean", MAIN),
                                                     "longest": ("response_length/max", THIN)})  # fmt: skip
    panel.set_ylim(0, 1.08 * panel.get_ylim()[1])


def times(panel: Axes, runs: Sequence[Metrics]) -> None:
    """Bars, not curves: seconds of a step by part, the mean over the steps of a run."""
    parts = [time_parts(run) for run in runs]
    panel.set_title("A step's time")
    panel.set_xlabel("seconds, mean of the steps")
    panel.grid(axis="y", visible=False)
    panel.set_yticks([])
    panel.set_ylim(len(runs) - 0.4, -0.6)
    names = [name for name in TIME_PARTS if any(name in part for part in parts)]
    if not names:
        panel.text(0.5, 0.5, "nothing recorded", transform=panel.transAxes, ha="center", va="center", color=FAINT)
        panel.set_xticks([])
        return
    for i, part in enumerate(parts):
        left = 0.0
        for name in names:
            width, shade = part.get(name, 0.0), 1 - 0.8 * names.index(name) / max(len(names) - 1, 1)
            panel.barh(i, width, left=left, height=0.62, color=color(i), alpha=shade, linewidth=0)
            left += width
    handles = [Patch(facecolor=FAINT, alpha=1 - 0.8 * i / max(len(names) - 1, 1), label=name)
               for i, name in enumerate(names)]  # fmt: skip
    panel.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.012, 0.99), ncols=4, borderpad=0,
                 handlelength=1, columnspacing=1.2, handletextpad=0.5, labelspacing=0.15, fontsize=9,
                 labelcolor=FAINT)  # fmt: skip


SUMMARY = (accuracy, trust_region, speculation, loss)
DETAILS = (entropy, teacher_logprob, lengths, times)


def color(run: int) -> str:
    return COLORS[run % len(COLORS)]


def _percent(value: float, _: float) -> str:
    return f"{100 * value:g}%"


def _line(panel: Axes, run: int, values: Sequence[Point], style: dict[str, Any]) -> None:
    style = MARKED if len(values) == 1 else style  # a line of one point would not show
    panel.plot([p.step for p in values], [p.value for p in values], color=color(run), **style)


def _smooth(panel: Axes, run: int, values: list[Point]) -> list[Point]:
    """One batch is noisy: in a long run a moving mean, with the single steps drawn faintly behind it."""
    half = len(values) // 50
    if not half:
        return values
    _line(panel, run, values, {"linewidth": 0.7, "alpha": 0.25})
    windows = [values[max(i - half, 0) : i + half + 1] for i in range(len(values))]
    return [Point(values[i].step, sum(p.value for p in w) / len(w)) for i, w in enumerate(windows)]


def _pair(panel: Axes, runs: Sequence[Metrics], title: str, unit: str, lines: dict[str, Any]) -> None:
    """One or two metrics of each run: `lines` has the name in the key -> metric and style."""
    for key, style in lines.values():
        for i, run in enumerate(runs):
            values = points(run, key)
            _line(panel, i, _smooth(panel, i, values) if style is MAIN else values, style)
    drawn = {label: style for label, (key, style) in lines.items() if any(points(run, key) for run in runs)}
    panel.set_ylabel(unit)
    _finish(panel, runs, title, drawn)


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
        panel.axvline(end, color=color(i), linewidth=0.9, alpha=0.6, zorder=1)
    if ends and title == "Accuracy":
        panel.annotate("warm-up ends", (ends[0][1], 0), (4, 6), xycoords=("data", "axes fraction"),
                       textcoords="offset points", fontsize=9, color=FAINT)  # fmt: skip
    handles = [Line2D([], [], color=FAINT, label=label, **style) for label, style in key.items()]
    panel.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.012, 1.01), ncols=len(key),
                 borderpad=0, handlelength=1.7, columnspacing=1.6, labelcolor=FAINT)  # fmt: skip
