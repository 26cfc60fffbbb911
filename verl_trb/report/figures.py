"""Panels as inline SVG whose colours are the page's, so that they follow its light or dark theme."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from verl_trb.report import panels
from verl_trb.report.metrics import Metrics
from verl_trb.report.picture import Panel

# Drawn in these, shown as the page's variables of those names.
THEMED = {panels.INK: "ink", panels.FAINT: "faint", panels.GRID: "grid"}
THEMED |= {color: f"run{i}" for i, color in enumerate(panels.COLORS)}


def inline_svg(draw: Panel, runs: Sequence[Metrics], name: str) -> str:
    """One panel as an <svg> element for an HTML page.

    name: of the panel, a word; it keeps the ids of several figures in one page apart.
    """
    look = panels.LOOK | {"svg.fonttype": "none", "svg.hashsalt": name, "svg.id": f"figure-{name}"}
    with mpl.rc_context(look):
        figure = Figure(figsize=(6, 3.8))
        FigureCanvasSVG(figure)
        panel = figure.subplots()
        figure.subplots_adjust(left=0.12, right=0.9, top=0.84, bottom=0.13)
        figure.patch.set_visible(False)
        panel.patch.set_visible(False)
        draw(panel, runs)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    # Ids of clip paths and markers are hashes of what they hold: the name keeps two figures' apart.
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for color, variable in THEMED.items():
        svg = svg.replace(color, f"var(--{variable})")
    # Text keeps its size and takes the page's font.
    svg = re.sub(
        r"font: (?:(bold) )?([\d.]+)px[^;\"]*", lambda m: f"font-size: {m[2]}px; font-weight: {m[1] or 'normal'}", svg
    )
    return svg
