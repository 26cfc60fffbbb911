"""verl's agent loops, the user's own among them: what a run may name, found before it starts."""

import difflib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from verl_trb.errors import UserError

KEY = "actor_rollout_ref.rollout.agent"
COLUMN = "agent_name"
ONE_TURN = "single_turn_agent"  # verl's name for its default, known here so that the usual run need not import verl


def check_agent_loop(config: DictConfig) -> None:
    """The file of agent loops is there and names classes of modules that are; the default is one of them, or of verl's.

    Raises UserError. The classes themselves are first seen by verl's rollout workers, which import them.
    """
    agent = config.actor_rollout_ref.rollout.agent
    default = str(agent.default_agent_loop)
    _check_names({default: f"{KEY}.default_agent_loop={default}"}, agent)


def check_agent_names(file: Path, rows: Sequence[dict[str, Any]], config: DictConfig) -> None:
    """Rows that name an agent loop of their own, in verl's column agent_name, name one that there is; else UserError
    with the first that does not.
    """
    if not any(COLUMN in row for row in rows):
        return
    named: dict[str, str] = {}  # by the first row of each
    for number, row in enumerate(rows):
        name = row.get(COLUMN)
        if not isinstance(name, str):
            raise UserError(f"{file}: row {number}, column {COLUMN!r}: {name!r} is not the name of an agent loop.")
        named.setdefault(name, f"{file}: row {number}, column {COLUMN!r}: {name}")
    _check_names(named, config.actor_rollout_ref.rollout.agent)


def _check_names(named: Mapping[str, str], agent: DictConfig) -> None:
    """named: name of an agent loop -> what names it."""
    own = _listed(agent.agent_loop_config_path) if agent.agent_loop_config_path else []
    if {*named} <= {ONE_TURN, *own} or os.environ.get("VERL_USE_EXTERNAL_MODULES"):
        return  # external modules may register any
    from verl.experimental.agent_loop.agent_loop import _agent_loop_registry

    names = [*own, *_agent_loop_registry]
    for name, what in named.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}."
            raise UserError(f"{what}: there is no such agent loop; {hint}")


def _listed(path: str) -> list[str]:
    """The names in a file of agent loops."""
    what = f"{KEY}.agent_loop_config_path={path}"
    if not Path(path).is_file():
        raise UserError(f"{what}: there is no such file.")
    try:
        entries = OmegaConf.load(path)
    except Exception as error:
        raise UserError(f"{what} is not YAML: {' '.join(str(error).split())}.") from None
    fields = ("name", "_target_")
    if not isinstance(entries, ListConfig) or not all(
        isinstance(entry, DictConfig) and all(isinstance(entry.get(field), str) for field in fields)
        for entry in entries
    ):
        raise UserError(f"{what} has to be a list of agent loops, each with a name and its class as _target_.")
    for entry in entries:
        module = entry._target_.rpartition(".")[0]
        if not _is_there(module):
            raise UserError(
                f"{what}: agent loop {entry.name} is {entry._target_}, and there is no module {module!r}; put its "
                "folder on PYTHONPATH."
            )
    return [entry.name for entry in entries]


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
