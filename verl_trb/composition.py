"""From the command line to complete, checked configurations, with Hydra but without its stack traces.

Imports neither torch nor verl nor Ray, so that a wrong key or value is answered within a second or two.
"""

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from verl_trb.config import explain, trb_config, unknown_key
from verl_trb.errors import ConfigError
from verl_trb.recipe_source import GROUP, METHOD, names, recipe_file, register
from verl_trb.rollout.engine_args import model_length
from verl_trb.verl_keys import check_counts, check_keys_and_kinds, known_keys

PACKAGE, BASE, VERSION = "verl_trb", "base", "1.3"  # where Hydra begins, and the version whose defaults it takes


def run(task: Callable[[DictConfig], int], arguments: Sequence[str] | None = None) -> int:
    """Composes the command's configuration (several with `--multirun`) and calls `task` with each, completed.

    arguments: the command line after the program's name, by default this process's.
    Returns the largest of the task's results. Raises ConfigError, one sentence, for a configuration that
    cannot be, and whatever `task` raises.
    """
    register()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    results = [0]
    run_dirs: set[str] = set()
    failures: list[Exception] = []

    def call(config: DictConfig) -> None:
        if failures:
            return
        try:
            complete(config)
            if config.trb.run_dir in run_dirs:
                shared = f"trb.run_dir={config.trb.run_dir}"
                raise ConfigError(f"Several runs of this sweep would share {shared}; leave it unset.")
            run_dirs.add(config.trb.run_dir)
            results.append(task(config))
        except Exception as error:  # raised below: Hydra would print a line of its own
            failures.append(error)

    options = any(argument.lstrip("+~").startswith(("-", "hydra")) for argument in arguments)
    try:
        (_call_by_hydra if options else _call_once)(call, arguments)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(sentence(error)) from error
    if failures:
        raise failures[0]
    return max(results)


def _call_by_hydra(call: Callable[[DictConfig], None], arguments: list[str]) -> None:
    """hydra.main with these arguments."""
    program, *own = sys.argv
    full_error = os.environ.get("HYDRA_FULL_ERROR")
    try:
        sys.argv = [program, *arguments]
        os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints and exits by itself
        hydra.main(config_path=f"pkg://{PACKAGE}", config_name=BASE, version_base=VERSION)(call)()
    finally:
        sys.argv = [program, *own]
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]


def _call_once(call: Callable[[DictConfig], None], overrides: list[str]) -> None:
    """What hydra.main does for a command without options. It would compose everything twice, which takes a second."""
    with hydra.initialize_config_module(PACKAGE, version_base=VERSION):
        config = hydra.compose(BASE, overrides, return_hydra_config=True)
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    try:
        call(config)
    finally:
        HydraConfig.instance().cfg = before


def complete(config: DictConfig) -> None:
    """Checks the keys and our values of a composed configuration, and fills in what follows from them.

    Filled in where null: trb.run_dir (made absolute), trainer.experiment_name, rollout.max_model_len.
    Raises ConfigError.
    """
    hydra_config = HydraConfig.get()
    overrides = list(hydra_config.overrides.task)
    added = {item.lstrip("+").partition("=")[0] for item in overrides if item.startswith("+")}
    trb = trb_config(config)
    recipe = hydra_config.runtime.choices[GROUP]
    check_keys_and_kinds(config, added, recipe)
    check_counts(config)
    with open_dict(config):
        config.trb.recipe = recipe
        config.trb.method = method = hydra_config.runtime.choices[METHOD] or ""
        config.trb.policy, config.trb.divergence = _absolute(trb.policy), _absolute(trb.divergence)
        run_dir = trb.run_dir or f"runs/{_run_name(recipe, method, trb.policy, overrides, hydra_config.mode)}"
        config.trb.run_dir = str(Path(run_dir).expanduser().absolute())
        if config.trainer.experiment_name is None:
            config.trainer.experiment_name = Path(run_dir).name
        rollout, data = config.actor_rollout_ref.rollout, config.data
        if rollout.max_model_len is None:
            rollout.max_model_len = model_length(data.max_prompt_length, data.max_response_length, trb.draft_tokens)


def sentence(error: Exception) -> str:
    """What Hydra, OmegaConf or the YAML parser has to say over many lines, in one sentence."""
    if isinstance(error, MissingConfigException):
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        if group in (GROUP, METHOD):
            return f"There is no {group} {name!r}; {_choices(group, name)}"
    if isinstance(error, OverrideParseException):
        return f"Cannot read {error.override!r} in the command: write key=value, and quote what the shell would change."
    if str(error).startswith(f"You must specify '{GROUP}'"):
        return f"No recipe given; {_choices(GROUP)}"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}: {error.problem or 'not YAML'}."
    cause: BaseException = error
    while not isinstance(cause, OmegaConfBaseException) and (inner := cause.__cause__ or cause.__context__):
        cause = inner
    if isinstance(cause, OmegaConfBaseException):
        key = cause.full_key or ""
        if str(cause.msg).startswith("Key ") and not key.startswith("trb."):
            return unknown_key(key, known_keys())
        return explain(cause)
    return f"The configuration cannot be composed: {' '.join(str(error).split())}."


def _choices(group: str, name: str = "") -> str:
    known = names(group)
    near = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {group}={near[0]}?" if near else f"choose with {group}=NAME from {', '.join(known)}."


def _run_name(recipe: str, method: str, policy: str, overrides: list[str], mode: RunMode | None) -> str:
    """recipe, -method if one was chosen, -policy if the command changed it, and in a sweep what tells runs apart."""
    name = recipe.replace("/", "_")
    if method:
        name += f"-{method.replace('/', '_')}"
    chosen = not method or any(item.startswith("trb.policy=") for item in overrides)
    if chosen and policy != _policy_of(recipe):
        name += f"-{policy.rpartition(':')[2]}"
    if mode == RunMode.MULTIRUN:
        own = [item for item in overrides if not item.startswith((f"{GROUP}=", f"{METHOD}=", "trb.policy="))]
        name += "".join(f"-{item.lstrip('+').replace('/', '_')}" for item in own)
    return name


def _absolute(name: str) -> str:
    """FILE:NAME with the file's whole path, because workers may stand elsewhere."""
    file, colon, rest = name.rpartition(":")
    return f"{Path(file).expanduser().absolute()}:{rest}" if colon else name


def _policy_of(recipe: str) -> str:
    file = recipe_file(recipe)
    content = yaml.safe_load(file.read_text()) if file else None
    return ((content or {}).get("trb") or {}).get("policy", "trb")
