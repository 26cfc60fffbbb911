"""The folder of a run: whether a command continues the run in it, has nothing left to do, or must not touch it.

config.yaml     the resolved configuration       metrics.jsonl   one JSON object a step
samples.jsonl   a few rollouts, token by token   logs/           what every process printed
timeline.jsonl  who worked when in each step   timeline.png    one step of it
report.html     the report, with its pictures    report.png      the picture of the curves
checkpoints/    verl's, with the optimizer       student/        the trained student, a Hugging Face folder
"""

import os
import shutil
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_trb.checkpoints import find
from verl_trb.errors import UserError
from verl_trb.redaction import redacted, secrets

CONFIG, METRICS, STUDENT, LOGS = "config.yaml", "metrics.jsonl", "student", "logs"
RELATIVES = 3  # more curves are hard to tell apart
# May differ between a run and its continuation: how long it goes on, how it is shown, where things stand.
FREE = ("trainer.total_training_steps", "trainer.total_epochs", "trainer.logger", "trainer.save_freq",
        "trainer.test_freq", "trainer.resume_mode", "trainer.max_actor_ckpt_to_keep", "trainer.val_before_train",
        "ray_kwargs", "dry_run", "trb.cache_dir", "trb.run_dir", "trb.prefork", "trb.sample_prompts",
        "trb.stall_seconds", "trb.max_restarts", "trb.warn", "trb.reward_seconds", "trb.reward_memory_mb",
        "actor_rollout_ref.actor.optim.total_training_steps", "actor_rollout_ref.rollout.custom")  # fmt: skip


class State(Enum):
    NEW = "new"
    UNFINISHED = "unfinished"
    FINISHED = "finished"


def last_checkpoint(run_dir: Path) -> int | None:
    """The step of the last complete checkpoint."""
    return find(run_dir / "checkpoints").step or None


def exported(run_dir: Path) -> bool:
    """The trained student is there: the last thing a run writes."""
    return (run_dir / STUDENT / "config.json").is_file()


def open_run(config: DictConfig) -> State:
    """Decide what the command means for its run folder, and write config.yaml for a new or continued run.

    With `trainer.resume_mode=disable` an earlier run in the folder is moved aside, never deleted.

    Raises:
        UserError: when the folder holds a run with other settings.
    """
    run_dir = Path(config.trb.run_dir)
    earlier = run_dir / CONFIG
    if config.trainer.resume_mode == "disable" and earlier.exists():
        _move_aside(run_dir)
    state = State.NEW
    # A run that failed before its first step has nothing to continue, and so no settings to keep.
    if earlier.exists() and ((run_dir / METRICS).exists() or last_checkpoint(run_dir) is not None):
        _refuse_other_settings(run_dir, OmegaConf.load(earlier), config)
        total = config.trainer.total_training_steps
        done = last_checkpoint(run_dir) or 0
        finished = total is not None and done >= total and exported(run_dir)
        state = State.FINISHED if finished else State.UNFINISHED
    if state is not State.FINISHED:
        run_dir.mkdir(parents=True, exist_ok=True)
        partial = earlier.with_suffix(".partial")
        partial.write_text(OmegaConf.to_yaml(OmegaConf.create(_written(config))))
        os.replace(partial, earlier)
    return state


def _written(config: DictConfig) -> dict[str, Any]:
    """What config.yaml holds: everything resolved, no secrets."""
    tree = OmegaConf.to_container(config, resolve=True)
    return redacted(tree, secrets(tree))


def relatives(run_dir: Path) -> list[Path]:
    """The runs to draw into one picture: this one, then the last `RELATIVES` of its recipe in the same folder."""
    recipe = _recipe(run_dir)
    files = sorted(run_dir.parent.glob(f"*/{METRICS}"), key=lambda file: file.stat().st_mtime, reverse=True)
    others = [file.parent for file in files if file.parent != run_dir]
    return [run_dir, *[other for other in others if recipe and _recipe(other) == recipe][:RELATIVES]]


def _recipe(run_dir: Path) -> str | None:
    try:
        return OmegaConf.select(OmegaConf.load(run_dir / CONFIG), "trb.recipe")
    except (OSError, ValueError):
        return None


def _move_aside(run_dir: Path) -> None:
    number = 1
    while (aside := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    shutil.move(run_dir, aside)


def _refuse_other_settings(run_dir: Path, earlier: Any, config: DictConfig) -> None:
    before = dict(_leaves(OmegaConf.to_container(earlier, resolve=True)))
    now = dict(_leaves(_written(config)))
    for key in sorted(before.keys() | now.keys()):
        if any(key == free or key.startswith(f"{free}.") for free in FREE):
            continue
        if before.get(key) != now.get(key):
            raise UserError(
                f"{run_dir} holds a run with {key}={before.get(key)}, and this command says {now.get(key)}: give the "
                "new run a folder of its own with trb.run_dir=FOLDER, or add trainer.resume_mode=disable to start "
                "anew (the earlier run is moved aside)."
            )


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for name, value in tree.items():
            yield from _leaves(value, f"{path}.{name}" if path else str(name))
    else:
        yield path, tree
