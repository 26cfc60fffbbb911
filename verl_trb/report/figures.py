"""Figures as inline SVG whose colours are the page's, so that they follow its light or dark theme."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from verl_trb.report import panels

# Drawn in these, shown as the page's variables of those names.
THEMED = {panels.INK: "ink", panels.FAINT: "faint", panels.GRID: "grid"}
THEMED |= {color: f"run{i}" for i, color in enumerate(panels.COLORS)}


# Inches, and the parts of them that the axes begin and end at.
PANEL = (6.0, 3.8), {"left": 0.12, "right": 0.9, "top": 0.84, "bottom": 0.13}
WIDE = (11.0, 4.4), {"left": 0.12, "right": 0.99, "top": 0.85, "bottom": 0.27}


def inline_svg(draw: Callable[[Axes], object], name: str, layout: tuple[tuple[float, float], dict] = PANEL) -> str:
    """What `draw` draws into axes, as an <svg> element for an HTML page.

    name: a word; it keeps the ids of several figures in one page apart.
    """
    size, margins = layout
    look = panels.LOOK | {"svg.fonttype": "none", "svg.hashsalt": name, "svg.id": f"figure-{name}"}
    with mpl.rc_context(look):
        figure = Figure(figsize=size)
        FigureCanvasSVG(figure)
        panel = figure.subplots()
        figure.subplots_adjust(**margins)
        figure.patch.set_visible(False)
        panel.patch.set_visible(False)
        draw(panel)
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
