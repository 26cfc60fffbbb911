"""The pictures of the diagnostics, in the report's look."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verl_trb.diagnostics.statistics import Interval

TITLES = {
    "continuation": ("Success of prefixes cut after t tokens, by who continues", "t, tokens", "share that ends well"),
    "entropy": ("The teacher's entropy on visited prefixes", "position in the response", "nats"),
    "auroc": ("Ranking rollouts by mean(log π_T − log π_S)", "share of the wrong ones", "share of the right ones"),
}


def draw(kind: str, series: dict[str, Any], out: Path) -> None:
    """One panel, with 95% intervals as bands."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from verl_trb.report import COLORS, LOOK

    title, x, y = TITLES[kind]
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(8, 5), dpi=120, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        panel = figure.subplots()
        for number, (name, found) in enumerate(series.items()):
            if kind == "continuation":  # a color for who made the prefix, a line for who continues
                color, line = COLORS[number // 2], ("-", "--")[number % 2]
                _band(panel, list(found), list(found.values()), color, name, linestyle=line, marker="o", markersize=4)
            elif kind == "entropy":
                label = f"{name}: {found['mean'].value:.3f} on average"
                _band(panel, range(1, 1 + len(found["positions"])), found["positions"], COLORS[number], label)
            else:
                area = found["auroc"]
                label = f"{name}: {area.value:.2f} [{area.low:.2f}, {area.high:.2f}]"
                panel.plot(*zip(*found["roc"], strict=True), color=COLORS[number], label=label)
        if kind == "auroc":
            panel.plot([0, 1], [0, 1], color="#6b7280", linewidth=0.9, linestyle=":")
        else:
            panel.set_ylim(bottom=0)
        panel.set_title(title, pad=12)
        panel.set_xlabel(x)
        panel.set_ylabel(y)
        panel.legend(loc="best")
        figure.savefig(out)


def _band(panel: Any, x: Sequence[int], values: Sequence[Interval], color: str, label: str, **style: Any) -> None:
    panel.plot(x, [value.value for value in values], color=color, label=label, **style)
    low, high = [value.low for value in values], [value.high for value in values]
    panel.fill_between(x, low, high, color=color, alpha=0.13, linewidth=0)
