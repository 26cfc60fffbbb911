"""The report as one picture, `report.png`: four panels, whatever the number of runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from verl_trb.report import panels
from verl_trb.report.metrics import Metrics, bounded, points, read_metrics, run_names

Panel = Callable[[Axes, Sequence[Metrics]], None]


def draw_report(run_dirs: Sequence[Path], out: Path, four: Sequence[Panel] = panels.SUMMARY) -> None:
    """Writes a picture of some runs (PNG, 2400×1600) to `out`, with four panels. Raises `ValueError` as
    `read_metrics`.
    """
    runs, names = [read_metrics(run_dir) for run_dir in run_dirs], []
    for run, name in zip(runs, run_names(run_dirs), strict=True):
        accuracy = points(run, "val/accuracy")
        span = f"   {accuracy[0].value:.1%} → {accuracy[-1].value:.1%}" if len(accuracy) > 1 else ""
        names.append(name + span)
    # The figure object instead of pyplot: no global state, and Agg whatever backend the user has configured.
    with mpl.rc_context(panels.LOOK):
        figure = Figure(figsize=(12, 8), dpi=200, facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 2).flat
        widths = sorted((len(name) + 7 for name in names), reverse=True)  # in characters, 133 to a line
        columns = max(c for c in (1, 2, 3) if c == 1 or (c <= len(runs) and sum(widths[:c]) <= 133))
        top = 0.83 - 0.035 * math.ceil(len(runs) / columns)
        figure.subplots_adjust(left=0.065, right=0.94, top=top, bottom=0.07, wspace=0.27, hspace=0.5)
        for panel, draw in zip(axes, four, strict=True):
            draw(panel, runs)
        title = "Trust-region behavior blending" if any(map(bounded, runs)) else "On-policy distillation"
        figure.text(0.065, 0.962, title, fontsize=17, fontweight="bold", va="center")
        handles = [Line2D([], [], color=panels.color(i), linewidth=3.5) for i in range(len(runs))]
        figure.legend(handles, names, loc="upper left", bbox_to_anchor=(0.058, 0.94), ncols=columns,
                      fontsize=11, handlelength=1.4, columnspacing=2.5)  # fmt: skip
        out = Path(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = out.with_name(out.name + ".part")  # a viewer never sees half a picture
        figure.savefig(unfinished, format="png")
        unfinished.replace(out)
