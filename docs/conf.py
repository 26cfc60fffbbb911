"""Sphinx's settings: `make docs` builds the site into build/docs and fails at any broken link."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

project = "verl_trb"
author = copyright = "the verl_trb authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
# Files beside docs/ are read in the repository, not on the site.
myst_url_schemes = ("http", "https", "mailto")
autodoc_member_order = "bysource"
autodoc_typehints = "description"
html_theme = "furo"
html_title = "verl_trb"
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_show_sphinx = False
copybutton_prompt_text = "$ "

ENTRY = re.compile(r"(?P<names>[A-Za-z_][\w.]*(?:, [A-Za-z_][\w.]*)*): (?P<text>.+)")
SECTION = re.compile(r"(Returns|Raises|Args|Yields):$")


def docstring_to_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """Our docstrings are plain text: `name: meaning` entries, their later lines indented by two, formulas by four."""
    if lines and lines[0].startswith("Alias for field number"):  # Python's own, of a NamedTuple's fields
        lines[:] = []
    made: list[str] = []
    in_entry = in_section = in_formula = False
    for line in lines:
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if not text:
            in_entry = in_section = False
            made.append("")
        elif SECTION.match(text):
            in_section, in_formula = True, False
            made += ["", f"**{text}**", ""]
        elif indent >= 4 and not in_section:
            if not in_formula:
                made += ["", "::", ""]
            made.append("    " + line.rstrip())
            in_formula = True
        elif entry := ENTRY.match(text) if indent == 0 or in_section else None:
            made += ["", f"* **{rst(entry['names'])}**: {rst(entry['text'])}"]
            in_entry, in_formula = True, False
        else:
            made.append(("  " if in_entry else "") + rst(text))
            in_formula = False
    lines[:] = "\n".join(made).split("\n")


def rst(text: str) -> str:
    """Plain text with `code` as reStructuredText."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # code that goes on in the next line
        return re.sub(r"([*|_`\\])", r"\\\1", text)
    return "".join(f"``{part}``" if i % 2 else re.sub(r"([*|_\\])", r"\\\1", part) for i, part in enumerate(parts))


def setup(app) -> None:
    app.connect("autodoc-process-docstring", docstring_to_rst)
