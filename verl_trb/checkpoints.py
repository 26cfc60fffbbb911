"""Checkpoint folders: written whole or not at all, found again, and pruned.

    checkpoints/global_step_N/            actor/ (verl's: weights, optimizer, learning rate, generators), data.json,
                                          metrics.json (the step's)
    checkpoints/global_step_N/complete.json   every file of the folder with its size, written last
    checkpoints/global_step_N.partial/    being written, or what a killed run left of it
    checkpoints/latest_checkpointed_iteration.txt   N, for verl's tools; written after the folder has its name

A folder is filled under its partial name and renamed when everything is on the disk, so a killed run leaves no folder
that looks complete; the sizes also tell a copy that was cut short. Imports neither torch nor verl.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

MANIFEST, TRACKER, PARTIAL = "complete.json", "latest_checkpointed_iteration.txt", ".partial"
NAME = re.compile(r"global_step_(\d+)")


@dataclass(frozen=True)
class Found:
    """newest: folder of the last complete checkpoint, None if there is none. step: its step, 0 for none.

    unusable: a sentence for each newer folder that is not complete.
    """

    newest: Path | None = None
    step: int = 0
    unusable: list[str] = field(default_factory=list)


def folder_of(root: Path, step: int) -> Path:
    return root / f"global_step_{step}"


def find(root: Path) -> Found:
    """The last complete checkpoint in `root`, and what newer ones lack."""
    unusable: list[str] = []
    for step, folder in sorted(_folders(root), reverse=True):
        reason = "it was half-written" if folder.name.endswith(PARTIAL) else fault(folder)
        if not reason:
            return Found(folder, step, unusable)
        unusable.append(f"the checkpoint of step {step} is not used: {reason}")
    return Found(unusable=unusable)


def fault(folder: Path) -> str:
    """What is wrong with a checkpoint folder; "" if every file that was written is there in its size."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        expected = {str(name): int(size) for name, size in files.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}, which is written last"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    for name, size in expected.items():
        try:
            actual = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if actual != size:
            return f"{name} has {actual} bytes instead of {size}"
    return ""


def begin(root: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of `step` into."""
    partial = folder_of(root, step).with_name(folder_of(root, step).name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def finish(partial: Path) -> Path:
    """Everything in `partial` is put on the disk and listed, and the folder gets its name, which is returned."""
    files = sorted(file for file in partial.rglob("*") if file.is_file())
    for file in files:
        _to_disk(file)
    sizes = {str(file.relative_to(partial)): file.stat().st_size for file in files}
    manifest = partial / MANIFEST
    manifest.write_text(json.dumps({"files": sizes}, indent=1))
    _to_disk(manifest)
    _to_disk(partial)
    target = partial.with_name(partial.name.removesuffix(PARTIAL))
    shutil.rmtree(target, ignore_errors=True)  # of this very step: one that was not complete, or is trained again
    partial.rename(target)
    _to_disk(target.parent)
    return target


def record(root: Path, step: int) -> None:
    """Writes verl's tracker file, whole or not at all."""
    part = root / f"{TRACKER}{PARTIAL}"
    part.write_text(str(step))
    _to_disk(part)
    os.replace(part, root / TRACKER)


def prune(root: Path, keep: int | None, newest: int) -> None:
    """Removes what a finished checkpoint of step `newest` makes needless: older complete ones but the last `keep`, and
    what is not complete. Later steps than `newest` belong to a run that went back to it, and are overwritten.

    keep: None keeps all.
    """
    complete = 0
    for step, folder in sorted(_folders(root), reverse=True):
        if step > newest:
            continue
        usable = not folder.name.endswith(PARTIAL) and not fault(folder)
        complete += usable
        if not usable or (keep and complete > keep):
            shutil.rmtree(folder, ignore_errors=True)


def _folders(root: Path) -> list[tuple[int, Path]]:
    if not root.is_dir():
        return []
    named = ((NAME.fullmatch(folder.name.removesuffix(PARTIAL)), folder) for folder in root.iterdir())
    return [(int(match[1]), folder) for match, folder in named if match and folder.is_dir()]


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
