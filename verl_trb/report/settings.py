"""What the settings of several runs differ in, from their config.yaml."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

# Follow from the folder's name or from the machine, and say nothing about the method.
UNTOLD = ("actor_rollout_ref.rollout.custom", "trb.run_dir", "trb.cache_dir", "trainer.experiment_name",
          "trainer.default_local_dir", "actor_rollout_ref.rollout.trace", "ray_kwargs")  # fmt: skip
ABSENT = "—"


def read_settings(run_dir: Path) -> dict[str, Any]:
    """The run's settings by dotted key, in the file's order; {} without a readable config.yaml."""
    try:
        tree = yaml.safe_load((Path(run_dir) / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return dict(_leaves(tree)) if isinstance(tree, dict) else {}


def differences(run_dirs: Sequence[Path]) -> dict[str, list[str]]:
    """Key -> its value in each run, as text, for the keys whose values are not the same; ours first."""
    runs = [read_settings(run_dir) for run_dir in run_dirs]
    keys = dict.fromkeys(key for run in runs for key in run if not key.startswith(UNTOLD))
    rows = {key: [str(run[key]) if key in run else ABSENT for run in runs] for key in keys}
    different = {key: row for key, row in rows.items() if len(set(row)) > 1}
    return dict(sorted(different.items(), key=lambda item: not item[0].startswith("trb.")))


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for name, value in tree.items():
            yield from _leaves(value, f"{path}.{name}" if path else str(name))
    else:
        yield path, tree
