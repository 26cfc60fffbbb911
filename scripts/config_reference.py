"""Writes docs/configuration.md: every key under `trb`, from the dataclasses and their docstrings.

python scripts/config_reference.py
"""

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

from verl_trb.config import TeacherConfig, TrbConfig, WarnConfig

TARGET = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
FILLED_IN = ("recipe", "method")

HEAD = """\
# Configuration

<!-- Made by scripts/config_reference.py from verl_trb/config.py; do not edit. -->

A run is verl's configuration, in which everything can be overridden as usual (`trainer.…`, `actor_rollout_ref.…`,
`data.…`; the student is `actor_rollout_ref.model.path`), and the keys below. Values are checked, and unknown keys
refused with the nearest known one, before anything is started. `python -m verl_trb.main recipe=NAME --cfg job` prints a
recipe's whole configuration, and `dry_run=true` what would run.

A *schedule* is a list of [step, value] points, the first step being 1: `[[1, 0.8], [16, 1.0]]` is 0.8 in the first
step, 1.0 from step 16 on, and a straight line between.
"""


def meanings(dataclass: type) -> dict[str, str]:
    """Name -> meaning, from the `name: meaning` entries of a dataclass's docstring; later lines are indented deeper.

    Raises ValueError when fields and entries are not the same.
    """
    entries: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(dataclass.__doc__ or "").splitlines()[1:]:
        if start := re.match(r"(\w+): (.*)", line):
            name = start[1]
            entries[name] = start[2]
        elif name and line.startswith("  "):
            entries[name] += " " + line.strip()
    fields = {field.name for field in dataclasses.fields(dataclass)}
    if wrong := fields ^ entries.keys():
        raise ValueError(
            f"{dataclass.__name__}: the docstring's entries are not its fields: {', '.join(sorted(wrong))}."
        )
    return entries


def table(dataclass: type, prefix: str) -> str:
    """One row a key: name, type, default, meaning."""
    texts = meanings(dataclass)
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(dataclass):
        if field.name in FILLED_IN or dataclasses.is_dataclass(field.type):
            continue
        given = field.default if field.default is not dataclasses.MISSING else "{}"
        default = given if isinstance(given, str) and given else json.dumps(given)
        kind = "number or schedule" if field.type is Any else _type(field.type)
        cells = (f"`{prefix}.{field.name}`", kind, f"`{default}`", texts[field.name])
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _type(annotation: object) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    text = text.replace("typing.", "").replace(" | None", " or null")
    return "names and values" if text.startswith("dict") else text


def page() -> str:
    parts = [HEAD, "## The method\n", table(TrbConfig, "trb"), "## The teacher\n", table(TeacherConfig, "trb.teacher")]
    parts += ["## Warnings\n", table(WarnConfig, "trb.warn")]
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(page())
    print(f"written: {TARGET}")
