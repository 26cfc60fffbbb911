"""The configuration under `trb`, typed and checked. Everything else in a run's configuration is verl's own.

Imports neither torch nor verl: a wrong value is refused within a second of the command.
"""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_trb.errors import ConfigError

LOSSES = ("full", "topk", "sampled")
DTYPES = ("bfloat16", "float16", "float32")


@dataclass
class TeacherConfig:
    """The frozen teacher.

    path: Hugging Face folder or hub name.
    dtype: bfloat16, float16 or float32; null is the rollout engine's for rollouts, the actor's for the loss.
    """

    path: str | None = None
    dtype: str | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        if self.dtype is not None:
            _one_of("trb.teacher.dtype", self.dtype, DTYPES)


@dataclass
class TrbConfig:
    """Trust-region behavior blending: rollouts, loss, and where a run keeps its files.

    teacher: the model to be distilled; the student is verl's actor_rollout_ref.model.path.
    policy: the distribution rollouts are drawn from, a name of verl_trb/policies.py or FILE.py:NAME of one's own.
    policy_params: its own parameters by name, each a number or a schedule: [step, value] points, steps from 1.
    epsilon: epsilon_0, the trust region's size at the first step, nats per token, >= 0.
    warmup_steps: K >= 1, steps after which rollouts are the student's own, for policies that are a warm-up.
    guided_steps: the same for any policy, >= 1; null is warmup_steps for warm-ups, else the whole run.
    draft_tokens: gamma >= 1, tokens the student drafts before the teacher reads them.
    loss: reverse KL over the `full` vocabulary, on the student's `topk`, or of the `sampled` token.
    topk: k >= 1 of the top-k loss.
    loss_chunk_tokens: tokens whose float32 logits exist at one time, >= 1.
    seed: of data order, rollouts and of what `prepare` makes, >= 0.
    prepare: a task whose models and data are made at first use and cached; null uses what the paths name.
    cache_dir: folder of what `prepare` makes.
    prefork: start Ray's workers as forks of one process that has imported everything, for recipes on one CPU machine.
    run_dir: folder of this run's results; null is runs/<recipe>[-<policy>].
    recipe, method: their names, filled in from the command.
    """

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    policy: str = "trb"
    policy_params: dict[str, Any] = field(default_factory=dict)
    epsilon: float = 0.02
    warmup_steps: int = 50
    guided_steps: int | None = None
    draft_tokens: int = 4
    loss: str = "full"
    topk: int = 16
    loss_chunk_tokens: int = 1024
    seed: int = 0
    prepare: str | None = None
    cache_dir: str = "~/.cache/verl_trb"
    prefork: bool = False
    run_dir: str | None = None
    recipe: str = ""
    method: str = ""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon >= 0):
            raise ConfigError(f"trb.epsilon must be a finite number >= 0 (nats per token), got {self.epsilon}.")
        if self.seed < 0:
            raise ConfigError(f"trb.seed must be >= 0, got {self.seed}.")
        at_least_one = {
            "warmup_steps": "steps until rollouts are the student's own; trb.epsilon=0 gives none at all",
            "draft_tokens": "tokens drafted before the teacher reads them",
            "topk": "tokens of the top-k loss",
            "loss_chunk_tokens": "tokens whose logits exist at one time",
        }
        if self.guided_steps is not None:
            at_least_one["guided_steps"] = "steps until rollouts are the student's own; trb.policy=student has none"
        for name, meaning in at_least_one.items():
            if getattr(self, name) < 1:
                raise ConfigError(f"trb.{name} must be >= 1 ({meaning}), got {getattr(self, name)}.")
        _one_of("trb.loss", self.loss, LOSSES)


def trb_config(config: DictConfig) -> TrbConfig:
    """The checked `trb` part of a composed configuration. Raises ConfigError, one sentence naming the key."""
    try:
        own = OmegaConf.to_container(config.trb, resolve=True)
        merged = OmegaConf.merge(OmegaConf.structured(TrbConfig), own)
        checked = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, prefix="trb")) from error
    assert isinstance(checked, TrbConfig)
    return checked


def trb_keys() -> list[str]:
    """Every key that may be set under `trb`, dotted."""
    own = [f"trb.{name}" for name in TrbConfig.__dataclass_fields__ if name not in ("recipe", "method")]
    return [*own, *(f"trb.teacher.{name}" for name in TeacherConfig.__dataclass_fields__)]


def explain(error: OmegaConfBaseException, prefix: str = "") -> str:
    """OmegaConf's several lines about a wrong key or value as one sentence.

    prefix: path of the node that was merged, when the error's own path is relative to it.
    """
    message = str(error.msg or error).splitlines()[0].rstrip(".")
    key = error.full_key or ""
    if prefix and key.split(".")[0] != prefix:
        key = f"{prefix}.{key}" if key else prefix
    if message.startswith("Key "):
        return unknown_key(key, trb_keys())
    return f"{key}: {message}." if key else f"{message}."


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The sentence that refuses `key`, with the nearest of the known ones."""
    known = list(known)
    parent, _, leaf = key.rpartition(".")
    siblings = {name: other for other in known for root, _, name in [other.rpartition(".")] if root == parent}
    near = [siblings[name] for name in difflib.get_close_matches(leaf, siblings, n=2, cutoff=0.7)]
    # Or the right name in the wrong place.
    near = near or [other for other in known if other.rpartition(".")[2] == leaf][:3]
    where = f"{parent} has" if parent else "there are"
    names = ", ".join([*sorted(siblings)[:12], *(["and more"] if len(siblings) > 12 else [])])
    hint = f"did you mean {' or '.join(near)}?" if near else f"{where} {names}." if names else "see --cfg job."
    return f"There is no configuration key {key}; {hint}"


def _one_of(key: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key} must be one of {', '.join(allowed)}; got {value!r}.")


# base.yaml starts `trb` from this schema, so Hydra checks every value that is merged into it.
_SCHEMA = OmegaConf.structured(TrbConfig)
OmegaConf.set_struct(_SCHEMA.policy_params, False)  # a command may set any: which there are, the policy knows
ConfigStore.instance().store(group="trb", name="schema", node=_SCHEMA, package="trb", provider="verl_trb")
