"""Makes a task's models and data at first use, and finds them again at every later one.

`prepare("table_walk", cache_dir)` returns the paths of student, teacher, train file and validation file. A
folder is made once for each task and settings: under a lock, in a temporary place beside it, and renamed when
complete, so a folder with the final name is always whole.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

RECIPE_VERSION = 3  # raise it when the code that makes a folder changes what it makes

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """What a run needs: two Hugging Face folders and two parquet files in verl's format."""

    student: Path
    teacher: Path
    train_file: Path
    val_file: Path


def _toy(name: str) -> tuple[Callable[[int], Any], Callable[[Path, Any, Progress], None]]:
    """Settings and maker of a toy task, the module `name`."""

    def of_seed(seed: int) -> Any:
        settings = importlib.import_module(f"verl_trb.tasks.{name}").SETTINGS  # every seed has the same teacher
        student_sft = dataclasses.replace(settings.student_sft, seed=settings.student_sft.seed + seed)
        return dataclasses.replace(settings, student_sft=student_sft, data_seed=seed)

    def make(folder: Path, settings: Any, progress: Progress) -> None:
        from verl_trb.tasks import toy_models

        task = importlib.import_module(f"verl_trb.tasks.{name}")
        train, val = task.make_rows(settings.num_train, settings.num_val, settings.data_seed)
        write_parquet(folder / "train.parquet", train)
        write_parquet(folder / "val.parquet", val)
        shape, sft = settings.teacher, settings.teacher_sft
        teacher = _folder(folder.parent, f"{name}-teacher", [shape, sft])
        if not teacher.exists():
            train_teacher = functools.partial(toy_models.make_trained, task, shape, sft, "teacher", progress)
            make_once(teacher, train_teacher, progress)
        shutil.copytree(teacher, folder / "teacher")
        shape, sft = settings.student, settings.student_sft
        toy_models.make_trained(task, shape, sft, "student", progress, folder / "student")
        accuracy = {
            which: toy_models.report_accuracy(folder / which, task, val, which, progress)
            for which in ("teacher", "student")
        }
        (folder / "accuracy.json").write_text(json.dumps(accuracy, indent=1) + "\n")

    return of_seed, make


def _make_smollm2(folder: Path, settings: Any, progress: Progress) -> None:
    from verl_trb.tasks import smollm2

    train, val = smollm2.make_rows(settings)
    write_parquet(folder / "train.parquet", train)
    write_parquet(folder / "val.parquet", val)
    smollm2.make_pair(folder, settings, progress)


def _smollm2_settings(seed: int) -> Any:
    from verl_trb.tasks.smollm2 import SmolSettings

    return SmolSettings(seed=seed)


# name -> (settings of a seed, maker); both import torch and transformers only when called
TASKS: dict[str, tuple[Callable[[int], Any], Callable[[Path, Any, Progress], None]]] = {
    "table_walk": _toy("table_walk"),
    "guess_work_check": _toy("guess_work_check"),
    "smollm2_pruned": (_smollm2_settings, _make_smollm2),
}


def prepare(
    name: str, cache_dir: Path | str, progress: Progress | None = None, settings: Any | None = None, seed: int = 0
) -> Prepared:
    """The models and data of task `name`, made under `cache_dir` if they are not there yet.

    `progress` receives short lines while something is made. `settings` (a dataclass of the task's module) replaces
    those of `seed`, and is part of the folder's name. Raises ValueError for an unknown name, a `cache_dir` that cannot
    be written, or a missing package that the task needs.
    """
    settings = settings_of(name, seed) if settings is None else settings
    folder = folder_of(name, cache_dir, settings)
    if not folder.exists():
        report = progress or (lambda line: None)
        make_once(folder, lambda partial: TASKS[name][1](partial, settings, report), report)
    return Prepared(
        student=folder / "student",
        teacher=folder / "teacher",
        train_file=folder / "train.parquet",
        val_file=folder / "val.parquet",
    )


def settings_of(name: str, seed: int = 0, params: Mapping[str, Any] | None = None) -> Any:
    """A task's own settings: `seed` varies the data and the student, `params` replaces fields, nested as they are.

    Raises ValueError for an unknown task or field, and for a value of another kind.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=3, cutoff=0.4) or sorted(TASKS)
        raise ValueError(f"trb.prepare: unknown task {name!r}; did you mean {' or '.join(map(repr, near))}?")
    return replaced(TASKS[name][0](seed), params or {})


def replaced(settings: Any, params: Mapping[str, Any], key: str = "trb.prepare_params") -> Any:
    """A dataclass with some of its fields replaced; `key` is what errors call it."""
    fields = {field.name for field in dataclasses.fields(settings)}
    new = {}
    for name, value in params.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=3, cutoff=0.4) or sorted(fields)
            raise ValueError(f"{key} has no {name!r}; did you mean {' or '.join(map(repr, near))}?")
        old = getattr(settings, name)
        if dataclasses.is_dataclass(old) and isinstance(value, Mapping):
            new[name] = replaced(old, value, f"{key}.{name}")
        elif isinstance(old, float) and type(value) is int:
            new[name] = float(value)
        elif isinstance(old, tuple) and isinstance(value, list | tuple) and len(value) == len(old):
            new[name] = tuple(map(float, value))
        elif type(value) is type(old) and not dataclasses.is_dataclass(old):
            new[name] = value
        else:
            raise ValueError(f"{key}.{name} must be like {old!r}, got {value!r}.")
    return dataclasses.replace(settings, **new)


def folder_of(name: str, cache_dir: Path | str, settings: Any) -> Path:
    """Where `prepare` keeps what these settings make, or would."""
    return _folder(Path(cache_dir).expanduser().absolute(), name, [settings])


def _folder(cache_dir: Path, name: str, settings: list[Any]) -> Path:
    """The folder of what `settings` (dataclasses) make."""
    key = json.dumps([RECIPE_VERSION, *map(dataclasses.asdict, settings)], sort_keys=True)
    return cache_dir / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def make_once(folder: Path, make: Callable[[Path], None], progress: Progress) -> None:
    """Calls `make` on a temporary folder, then renames it; one process at a time, nothing left on failure."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(folder.name + ".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress(f"waiting for another process that is making {folder.name}")
            lock.acquire()
    except OSError as error:
        raise ValueError(
            f"trb.cache_dir={folder.parent} cannot be written ({error.strerror}): choose a folder that can."
        ) from error
    partial = folder.with_name(folder.name + ".partial")
    try:
        if folder.exists():  # the process we waited for has made it
            return
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir()
        make(partial)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        lock.release()


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as one parquet file; column types are inferred, so all rows have the same keys."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
