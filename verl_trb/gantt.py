"""One step as a Gantt picture: who worked when, from the spans of timeline.py.

    python -m verl_trb.gantt RUN [--step N] [--out PICTURE.png]      # by default the step of median length

Reads files only: it works while a run goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from verl_trb.report.panels import FAINT, INK, LOOK
from verl_trb.timeline import Span, StepTimeline, read_timeline, typical

PICTURE = "timeline.png"
# A lane with more spans of one name than this at a time is drawn as that many thin bars, stacked by their start.
STACK_HEIGHT = 2.4
NAMES = {  # in the order of the legend: verl's names, and ours, with a colour and what they mean
    "submit": ("#94a3b8", "prompts sent out"),
    "gen": ("#2563eb", "waiting for rollouts"),
    "old_log_prob": ("#0891b2", "log-probabilities"),
    "ref": ("#0e7490", "reference model"),
    "adv": ("#ca8a04", "advantages"),
    "update_actor": ("#ea580c", "update"),
    "save_checkpoint": ("#475569", "checkpoint"),
    "update_weights": ("#059669", "weight sync"),
    "generate": ("#60a5fa", "a rollout is generated"),
    "reward": ("#db2777", "rewarded"),
    "store": ("#a78bfa", "stored"),
    "teacher": ("#9333ea", "teacher's pass"),
    "student": ("#f59e0b", "student, forward and backward"),
    "optimizer": ("#7c2d12", "optimizer"),
}
OTHER = ("#cbd5e1", "")
LANES = {"trainer": "trainer", "rollouts": "rollouts", "worker": "training worker"}


def draw_gantt(axes: Axes, step: StepTimeline) -> None:
    """Draw a step's spans into `axes`: a lane a process, seconds to the right, and a legend of what occurs."""
    lanes = [lane for lane in LANES if any(span.lane == lane for span in step.spans)]
    lanes += sorted({span.lane for span in step.spans} - set(lanes))
    ticks, top = [], 0.0
    for lane in lanes:
        spans = sorted((span for span in step.spans if span.lane == lane), key=lambda span: (span.start, span.end))
        rows = _rows(spans)
        height = STACK_HEIGHT if max(rows, default=0) > 2 else 0.8
        thick = height / (max(rows, default=0) + 1)
        for span, row in zip(spans, rows, strict=True):
            color = NAMES.get(span.name, OTHER)[0]
            axes.barh(top + (row + 0.5) * thick, span.end - span.start, thick * 0.92, span.start, color=color)
            _label(axes, span, top + height / 2, step.seconds) if height < 1 else None
        ticks.append((top + height / 2, LANES.get(lane, lane)))
        top += height + 0.35
    axes.set(xlim=(0, step.seconds), ylim=(top, -0.2), xlabel="seconds")
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
    axes.tick_params(axis="y", labelsize=11, labelcolor=INK)
    axes.grid(axis="y", visible=False)
    axes.set_title(f"Step {step.step}: {step.seconds:.2f} s")
    shown = [name for name in NAMES if any(span.name == name for span in step.spans)]
    handles = [Patch(color=NAMES[name][0], label=NAMES[name][1]) for name in shown]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=5, handlelength=1, fontsize=9.5)


def _rows(spans: list[Span]) -> list[int]:
    """The row of each span, sorted by start: spans that follow one another, as one rollout's do, share one."""
    ends: list[float] = []
    rows = []
    for span in spans:
        # The row that ended last: a rollout's next span starts where its last one ended.
        free = [row for row, end in enumerate(ends) if end <= span.start + 1e-4]
        row = max(free, key=lambda row: ends[row]) if free else len(ends)
        ends[row : row + 1] = [span.end]
        rows.append(row)
    return rows


def _label(axes: Axes, span: Span, y: float, seconds: float) -> None:
    """The span's length in it, where there is room."""
    length = span.end - span.start
    if length > 0.06 * seconds:
        axes.text(span.start + length / 2, y, f"{length:.2f} s", ha="center", va="center", color="white", fontsize=10)


def write_gantt(run_dir: Path, path: Path | None = None, step: int | None = None) -> StepTimeline:
    """Draw `step` of a run, by default a typical one, into the picture `path`, by default in its folder. Returns it.

    Raises ValueError if the run has recorded no such step.
    """
    steps = read_timeline(run_dir)
    if step is not None:
        steps = [one for one in steps if one.step == step][-1:]
    if not steps:
        raise ValueError(f"{run_dir} has recorded no timeline" + (f" of step {step}." if step is not None else " yet."))
    chosen = typical(steps)
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        draw_gantt(figure.add_subplot(), chosen)
        figure.text(0.995, 0.98, str(run_dir.name), ha="right", va="top", color=FAINT)
        figure.savefig(path or run_dir / PICTURE, dpi=130)
    return chosen


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m verl_trb.gantt", description="One step of a run as a picture.")
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--step", type=int, help="by default the step of median length")
    parser.add_argument("--out", type=Path, help=f"by default RUN/{PICTURE}")
    given = parser.parse_args(arguments)
    out = given.out or given.run / PICTURE
    try:
        chosen = write_gantt(given.run, out, given.step)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"step {chosen.step}, {chosen.seconds:.2f} s: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
