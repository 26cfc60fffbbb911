"""The problems of an evaluation: rows of data files in verl's format, as sets, and the reward function of each set.

A set is all rows of one `data_source`, which is also what chooses the reward function, as in training.
"""

import hashlib
import importlib
import json
import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from verl_trb.data.output import VERL_COLUMNS
from verl_trb.data.sources import REASONING_GYM, SOURCES, find_source
from verl_trb.data_files import check_rows, read_rows
from verl_trb.errors import UserError

MATH = "verl_trb.rewards.math:compute_score"
TOYS = "table_walk", "guess_work_check"  # tasks of verl_trb/tasks; their sources begin with their names
Score = Callable[[str], float]  # of a response's text


@dataclass(frozen=True)
class Problem:
    """One row: the chat that asks it, and what its reward function wants to know. `id` is unique in its set."""

    id: str
    source: str
    messages: list[dict[str, str]]
    answer: str
    extra: dict[str, Any]


@dataclass(frozen=True)
class ProblemSet:
    """All problems of one source, in the file's order. digest: of all of them, whatever `limit` leaves."""

    name: str
    file: Path
    problems: list[Problem]
    digest: str


def find_file(data: str, folder: Path) -> Path:
    """A data file by its path, or a set that prepare_data has made in `folder` by its name. Raises UserError."""
    path = Path(data).expanduser()
    if path.exists() or path.suffix or "/" in data:
        if not path.is_file() and path.stem in SOURCES:
            raise UserError(
                f"There is no data file {path}; make it with `python -m verl_trb.prepare_data {path.stem}`."
            )
        return path
    name = find_source(data).name
    file = folder / f"{name}.parquet"
    if not file.is_file():
        raise UserError(f"There is no data file {file}; make it with `python -m verl_trb.prepare_data {name}`.")
    return file


def read_sets(files: Sequence[Path], limit: int | None = None) -> list[ProblemSet]:
    """The sets in the files, with the first `limit` problems of each.

    Raises UserError for a file that verl could not read, two rows of a set with one id, and a set in two files.
    """
    sets: dict[str, ProblemSet] = {}
    for file in files:
        rows = read_rows(file)
        check_rows(file, rows, VERL_COLUMNS)
        found: dict[str, dict[str, tuple[int, Problem]]] = {}
        for number, row in enumerate(rows):
            problem = _problem(row, number)
            if problem.source in sets:
                raise UserError(
                    f"The set {problem.source!r} is in {sets[problem.source].file} and in {file}; give one."
                )
            ids = found.setdefault(problem.source, {})
            if problem.id in ids:
                raise UserError(
                    f"{file}: rows {ids[problem.id][0]} and {number} of the set {problem.source!r} have the same id "
                    f"{problem.id!r}; an evaluation set has one row a problem, so remove one or give it another id."
                )
            ids[problem.id] = number, problem
        for name, ids in found.items():
            problems = [problem for _, problem in ids.values()]
            sets[name] = ProblemSet(name, file, problems[:limit], _digest(problems))
    return list(sets.values())


def reward_name(problems: ProblemSet, chosen: str | None) -> str:
    """A set's reward function, MODULE:NAME or FILE.py:NAME: the one chosen, else the source's. Raises UserError."""
    if name := chosen or source_reward(problems.name):
        return name
    raise UserError(
        f"{problems.file}: no reward function is known for the data_source {problems.name!r}; name one with "
        f"--reward, for example --reward {MATH}."
    )


def source_reward(source: str) -> str | None:
    """The reward function of a data_source as MODULE:NAME; None for those not made here."""
    for toy in TOYS:
        if source.startswith(toy):
            return f"verl_trb.tasks.{toy}:compute_score"
    return MATH if source in SOURCES or source.startswith(REASONING_GYM) else None


def load_reward(name: str) -> Callable[..., Any]:
    """A reward function of verl's form by MODULE:NAME or FILE.py:NAME. Raises UserError."""
    place, colon, function = name.removeprefix("pkg://").rpartition(":")
    if not colon or not place:
        raise UserError(f"--reward takes MODULE:NAME or FILE.py:NAME, got {name!r}.")
    try:
        known = runpy.run_path(place) if place.endswith(".py") else vars(importlib.import_module(place))
    except Exception as error:  # whatever a file of the user's raises
        raise UserError(f"--reward {name}: {place} cannot be run ({type(error).__name__}: {error}).") from None
    if not callable(known.get(function)):
        raise UserError(f"--reward {name}: there is no function {function!r} in {place}.")
    return known[function]


def scorer(reward: Callable[..., Any], problem: Problem) -> Score:
    """The reward of a response to a problem, as verl calls it and reads it: a number, or a record with `score`."""
    call = partial(reward, data_source=problem.source, ground_truth=problem.answer, extra_info=problem.extra)

    def score(text: str) -> float:
        value = call(solution_str=text)
        return float(value["score"] if isinstance(value, dict) else value)

    return score


def _problem(row: dict[str, Any], number: int) -> Problem:
    extra = row.get("extra_info")
    extra = extra if isinstance(extra, dict) else {}
    identity = next((extra[name] for name in ("id", "index") if extra.get(name) is not None), number)
    return Problem(
        id=str(identity),
        source=row["data_source"],
        messages=[{"role": m["role"], "content": m["content"]} for m in row["prompt"]],
        answer=row["reward_model"]["ground_truth"],
        extra=extra,
    )


def _digest(problems: list[Problem]) -> str:
    rows = [[problem.id, problem.messages, problem.answer] for problem in problems]
    return hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest()[:16]
