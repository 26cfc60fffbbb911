"""A reward function of the user's own, checked before the run and called with limits on time and memory.

verl would call it in its reward worker, where nothing could end it: a thread that hangs hangs the run. Here verl calls
`compute_score` below instead, which asks a process of the sandbox. Functions of this package are called as they are.
"""

import ast
import difflib
import importlib.util
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from verl_trb.errors import UserError
from verl_trb.rewards.judges import FILE, FUNCTION, PACKAGE
from verl_trb.rewards.keeper import DIED, TIME_LIMIT
from verl_trb.rewards.sandbox import Limits, ask

KEY = "reward.custom_reward_function"


class RewardFailed(RuntimeError):
    """A reward function raised, was too slow or died; its rollout is left out and counted."""


def limit(config: DictConfig) -> None:
    """Puts `compute_score` in the place of the configuration's own reward function, unless there is no limit.

    Not with a reward model: its function asks a server whose handle does not leave verl's worker.
    """
    function, trb = config.reward.custom_reward_function, config.trb
    own = function.path and not function.path.startswith(f"{PACKAGE}verl_trb.")
    if trb.reward_seconds is None or not own or config.reward.reward_model.enable:
        return
    function.reward_kwargs = {
        "path": function.path,
        "name": function.name,
        "arguments": dict(function.get("reward_kwargs") or {}),
        "seconds": trb.reward_seconds,
        "memory_mb": trb.reward_memory_mb,
    }
    function.path, function.name = f"{PACKAGE}{__name__}", compute_score.__name__


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    *,
    path: str,
    name: str,
    arguments: dict[str, Any],
    seconds: float,
    memory_mb: int,
) -> Any:
    """What `name` of `path` returns: a number, or a mapping with "score". Raises RewardFailed, one sentence.

    arguments: the user's reward_kwargs. Of `extra_info` only what JSON can hold arrives.
    """
    own = {"data_source": data_source, "solution_str": solution_str, "ground_truth": _plain(ground_truth)}
    extra = {key: _plain(value) for key, value in (extra_info or {}).items()}
    own["extra_info"] = {key: value for key, value in extra.items() if value is not None}
    outcome = ask((FUNCTION, path, name), {"arguments": {**own, **arguments}}, Limits(seconds, memory_mb))
    if outcome.failed == TIME_LIMIT:
        raise RewardFailed(f"{name} of {path} took longer than {seconds:g} s (trb.reward_seconds).")
    if outcome.failed == DIED:
        more = f"it crashed, or needed more than {memory_mb:,} MiB beside its imports (trb.reward_memory_mb)"
        raise RewardFailed(f"{name} of {path} died: {more}.")
    if outcome.failed:
        raise RewardFailed(outcome.error)
    return outcome.verdict


def _plain(value: Any) -> Any:
    """The same of JSON's kinds; None where there is none."""
    try:
        return json.loads(json.dumps(value, default=lambda other: other.tolist()))
    except (AttributeError, TypeError, ValueError):
        return None


def check_reward_function(config: DictConfig) -> None:
    """The file or module is there and defines the function. Raises UserError."""
    function = config.reward.custom_reward_function
    if not function.path:
        return
    if function.path.startswith(PACKAGE):
        file = _file_of(function.path.removeprefix(PACKAGE))
    else:
        file = Path(function.path.removeprefix(FILE))
    if file is None or not file.is_file():
        raise UserError(f"{KEY}.path={function.path}: there is no such {'file' if file else 'module'}.")
    try:
        tree = ast.parse(file.read_text())
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{KEY}.path={function.path} is not Python: {error}.") from None
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    # A name that the file mentions may be assigned or imported: that shows when it is called.
    if function.name not in file.read_text():
        near = difflib.get_close_matches(function.name, defined, 1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(defined) or 'none'}."
        raise UserError(f"{KEY}.name={function.name}: {function.path} defines no such function; {hint}")


def _file_of(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin else None
