"""Which keys verl's configuration has, and what kind of value each takes; checked for recipes and commands alike.

verl keeps its whole configuration in one file for reference. Sections with a `_target_` also take the fields of that
dataclass of verl's which the file leaves out; those are read from verl's source, because importing it takes seconds.
"""

import ast
import importlib.util
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from verl_trb.config import trb_keys, unknown_key
from verl_trb.errors import ConfigError
from verl_trb.recipe_source import verl_config_folder

# Ours; a config group of verl's; and what verl passes on whole to Ray, vLLM and transformers.
NOT_CHECKED = (
    "trb",
    "dry_run",
    "method_defaults",
    "model_engine",
    "ray_kwargs.ray_init",
    "actor_rollout_ref.rollout.engine_kwargs",
    "actor_rollout_ref.model.override_config",
)
# What batches and the engine are made of. verl leaves most of them unchecked.
COUNTS = (
    "data.train_batch_size",
    "data.max_prompt_length",
    "data.max_response_length",
    "actor_rollout_ref.actor.ppo_mini_batch_size",
    "actor_rollout_ref.actor.ppo_epochs",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
    "actor_rollout_ref.rollout.n",
    "actor_rollout_ref.rollout.max_num_seqs",
    "actor_rollout_ref.rollout.max_num_batched_tokens",
    "actor_rollout_ref.rollout.tensor_model_parallel_size",
    "trainer.n_gpus_per_node",
    "trainer.nnodes",
    "trainer.save_freq",
    "trainer.test_freq",
)
OPTIONAL_COUNTS = (
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu",
    "actor_rollout_ref.rollout.max_model_len",
    "trainer.total_training_steps",
    "trainer.max_actor_ckpt_to_keep",
)
TEMPERATURES = ("actor_rollout_ref.rollout.temperature", "actor_rollout_ref.rollout.val_kwargs.temperature")
LARGEST = 2**31 - 1
ABSENT = object()


def check_keys_and_kinds(config: DictConfig, added: set[str], recipe: str) -> None:
    """Raises ConfigError for a key that verl does not know, or a value of the wrong kind, in verl's part of `config`.

    Hydra itself checks only the keys in a command, not those in files.
    added: keys the command added with a +, which are taken as they are. recipe: its name, for the sentence.
    """
    exempt = {*NOT_CHECKED, *added}
    for key, value, reference in _differences(OmegaConf.to_container(config, resolve=False), _verl_config()):
        if any(key == name or key.startswith(f"{name}.") for name in exempt):
            continue
        if reference is ABSENT:
            problem = unknown_key(key, known_keys()).rstrip("?.")
            raise ConfigError(f"{problem} (set by recipe {recipe} or a file it includes).")
        if kind := _wrong_kind(value, reference):
            raise ConfigError(f"{key} must be {kind}, got {value!r}.")


def check_counts(config: DictConfig) -> None:
    """Raises ConfigError for a size that is not a whole number, or a temperature that is not a finite one."""
    for keys, optional in ((COUNTS, False), (OPTIONAL_COUNTS, True)):
        for key in keys:
            value = OmegaConf.select(config, key)
            if optional and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise ConfigError(f"{key} must be a whole number, got {_shown(value)}.")
            if abs(value) > LARGEST:
                raise ConfigError(f"{key} must be less than 2^31, got {value}.")
    for key in TEMPERATURES:
        value = OmegaConf.select(config, key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise ConfigError(f"{key} must be a number, got {_shown(value)}.")


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)


def known_keys() -> list[str]:
    """All dotted keys of verl's configuration and of ours, for near matches."""
    return [*_dotted(_verl_config()), *trb_keys()]


@cache
def _verl_config() -> dict[str, Any]:
    with open(verl_config_folder() / "_generated_ppo_trainer.yaml") as file:
        return yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _differences(tree: Any, known: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Key, value and verl's own value (or ABSENT) of what a tree has besides `known` or has changed.

    An empty or absent dictionary in `known` takes any key.
    """
    if not (isinstance(tree, dict) and isinstance(known, dict)):
        if tree != known:
            yield path, tree, known
    elif known:
        for name, value in tree.items():
            key = f"{path}.{name}" if path else str(name)
            if name in known:
                yield from _differences(value, known[name], key)
            elif name not in _declared_fields(known.get("_target_")):
                yield key, value, ABSENT


def _wrong_kind(value: Any, reference: Any) -> str:
    """What a value must be, where verl's own value shows that it is not; null and ${...} can stand anywhere."""
    if value is None or (isinstance(value, str) and value.startswith("${")):
        return ""
    match reference:
        case bool():
            return "" if isinstance(value, bool) else "true or false"
        case int() | float():
            return "" if isinstance(value, (int, float)) and not isinstance(value, bool) else "a number"
        case dict():
            return "" if isinstance(value, dict) else "a section with keys of its own"
    return ""


def _declared_fields(target: str | None) -> set[str]:
    """Fields of the dataclass `verl.package.Class`, inherited ones included, found in the source of its package."""
    package, _, name = (target or "").rpartition(".")
    root, *inner = package.split(".")
    spec = importlib.util.find_spec(root) if root == "verl" else None
    if spec is None or not spec.submodule_search_locations:
        return set()
    folder = Path(next(iter(spec.submodule_search_locations))).joinpath(*inner)
    folder = folder if folder.is_dir() else folder.parent
    classes: dict[str, ast.ClassDef] = {}
    for file in folder.glob("*.py"):
        classes |= {node.name: node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)}
    fields: set[str] = set()
    pending = [name]
    while pending:
        if node := classes.get(pending.pop()):
            fields |= {
                item.target.id
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            }
            pending += [base.id for base in node.bases if isinstance(base, ast.Name)]
    return fields


def _dotted(tree: dict[str, Any], path: str = "") -> list[str]:
    keys: list[str] = []
    for name, value in tree.items():
        key = f"{path}.{name}" if path else str(name)
        keys += [key, *(_dotted(value, key) if isinstance(value, dict) else [])]
    return keys
