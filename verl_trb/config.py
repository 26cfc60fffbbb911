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
from verl_trb.parameters import Parameter, check_value, value_at
from verl_trb.placement import PLACEMENTS

LOSSES = ("full", "topk", "sampled")
DTYPES = ("bfloat16", "float16", "float32")


@dataclass
class TeacherConfig:
    """The frozen teacher.

    path: Hugging Face folder or hub name.
    dtype: bfloat16, float16 or float32; null is the rollout engine's for rollouts, the actor's for the loss.
    offload: keep the training worker's copy on the host between its forward passes.
    """

    path: str | None = None
    dtype: str | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        if self.dtype is not None:
            _one_of("trb.teacher.dtype", self.dtype, DTYPES)


@dataclass
class WarnConfig:
    """From where on a step's numbers are warned about (guard_rails.py).

    mismatch: nats per token that engine and trainer may disagree on the student, > 0.
    spike: times the median of the last steps that the reverse KL or the gradient's norm may reach, > 1.
    collapse: share of the median of the last steps that entropy or length must keep, in [0, 1).
    eos_rate: share of the responses that must say their end, in [0, 1); at this share or less it is warned about.
    """

    mismatch: float = 0.05
    spike: float = 10.0
    collapse: float = 0.1
    eos_rate: float = 0.0

    def __post_init__(self) -> None:
        ranges = {
            "mismatch": (self.mismatch > 0, "> 0 (nats per token)"),
            "spike": (self.spike > 1, "> 1 (times the usual value)"),
            "collapse": (0 <= self.collapse < 1, "in [0, 1) (share of the usual value)"),
            "eos_rate": (0 <= self.eos_rate < 1, "in [0, 1) (share of the responses)"),
        }
        for name, (good, range_) in ranges.items():
            if not good:
                raise ConfigError(f"trb.warn.{name} must be {range_}, got {getattr(self, name)}.")


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
    adapt_drafts: choose for each block how many, up to draft_tokens, by what steps cost and how many drafts were
      accepted.
    release_teacher: free the rollout engine's copy of the teacher once no step needs it for rollouts any more.
    reuse_verification: train on what the rollout engine knew of the teacher when it verified the drafts, instead of
      reading the teacher again: its hidden states, of the top-k reverse KL only its numbers.
    loss: how the divergence is computed: over the `full` vocabulary, on `topk` tokens, or of the `sampled` token.
    topk: k >= 1 of the top-k losses.
    divergence: the loss between student and teacher, a name of verl_trb/divergences.py or FILE.py:NAME of one's own.
    divergence_params: its own parameters by name, each a number or a schedule: [step, value] points, steps from 1.
    sft_steps: >= 0; the first so many steps are supervised fine-tuning on the teacher's rollouts.
    data_share: share of the rollouts that are the data's own responses, a number or a schedule in [0, 1]; GKD's
      1 - lambda.
    data_response: column of the data that has these responses; dots go inward: reward_model.ground_truth.
    distill_weight: of the divergence, >= 0, a number or a schedule. Where it is 0 the teacher is not read.
    reward_weight: of verl's policy gradient of the reward, >= 0, a number or a schedule.
    placement: where the rollout engines live, `colocated`: on the devices that train.
    loss_chunk_tokens: tokens whose float32 logits exist at one time, >= 1.
    lr_warmup: shape of the learning rate's rise over actor.optim.lr_warmup_steps, `linear` (verl's) or `cosine`, for
      lr_scheduler_type=constant.
    seed: of data order, rollouts and of what `prepare` makes, >= 0.
    deterministic: reruns, and resumed runs, are to be equal bit by bit on a CPU: rollouts one at a time, each with a
      seed of its own. Slow, for finding faults.
    stall_seconds: a run in which nothing moves for so long is stopped, > 0: longer than the longest rollout, or than
      loading the models takes.
    reward_seconds: what a reward function of your own may take for one rollout, > 0; null calls it inside verl's
      worker, without limits.
    reward_memory_mb: MiB it may need beside its imports, >= 1.
    max_restarts: how often a run goes on by itself from its last checkpoint when a process has died or hangs, >= 0.
    warn: thresholds of warnings about a step's numbers.
    prepare: a task whose models and data are made at first use and cached; null uses what the paths name.
    prepare_params: fields of that task's settings that are to be different, nested as they are there.
    cache_dir: folder of what `prepare` makes.
    prefork: start Ray's workers as forks of one process that has imported everything, for recipes on one CPU machine.
    run_dir: folder of this run's results; null is runs/<recipe>[-<policy>].
    sample_prompts: validation prompts whose rollouts are kept for the report, at four steps, >= 0; 0 keeps none.
    recipe: its name, filled in from the command.
    method: its name, filled in from the command.
    """

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    policy: str = "trb"
    policy_params: dict[str, Any] = field(default_factory=dict)
    epsilon: float = 0.02
    warmup_steps: int = 50
    guided_steps: int | None = None
    draft_tokens: int = 4
    adapt_drafts: bool = False
    release_teacher: bool = False
    reuse_verification: bool = False
    loss: str = "full"
    topk: int = 16
    divergence: str = "reverse_kl"
    divergence_params: dict[str, Any] = field(default_factory=dict)
    sft_steps: int = 0
    data_share: Any = 0.0
    data_response: str = "response"
    distill_weight: Any = 1.0
    reward_weight: Any = 0.0
    placement: str = "colocated"
    loss_chunk_tokens: int = 1024
    lr_warmup: str = "linear"
    seed: int = 0
    deterministic: bool = False
    stall_seconds: float = 1800.0
    reward_seconds: float | None = 60.0
    reward_memory_mb: int = 4096
    max_restarts: int = 2
    warn: WarnConfig = field(default_factory=WarnConfig)
    prepare: str | None = None
    prepare_params: dict[str, Any] = field(default_factory=dict)
    cache_dir: str = "~/.cache/verl_trb"
    prefork: bool = False
    run_dir: str | None = None
    sample_prompts: int = 2
    recipe: str = ""
    method: str = ""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon >= 0):
            raise ConfigError(f"trb.epsilon must be a finite number >= 0 (nats per token), got {self.epsilon}.")
        for name in ("seed", "sample_prompts", "max_restarts"):
            if getattr(self, name) < 0:
                raise ConfigError(f"trb.{name} must be >= 0, got {getattr(self, name)}.")
        if not self.stall_seconds > 0:
            raise ConfigError(f"trb.stall_seconds must be > 0 (seconds), got {self.stall_seconds}.")
        if self.reward_seconds is not None and not self.reward_seconds > 0:
            raise ConfigError(f"trb.reward_seconds must be > 0 (seconds) or null, got {self.reward_seconds}.")
        at_least_one = {
            "reward_memory_mb": "MiB that a reward function may need",
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
        if self.placement == "separate":
            raise ConfigError(
                "trb.placement=separate is not there: with synchronous steps (trainer.v1.trainer_mode=sync) engines on "
                "nodes of their own and the training nodes would wait for each other; set trb.placement=colocated."
            )
        if self.adapt_drafts and self.deterministic:
            raise ConfigError(
                "trb.adapt_drafts=true and trb.deterministic=true exclude each other: the number of drafts would "
                "follow the clock, and reruns would differ; remove one."
            )
        _one_of("trb.placement", self.placement, PLACEMENTS)
        _one_of("trb.lr_warmup", self.lr_warmup, ("linear", "cosine"))
        _one_of("trb.loss", self.loss, LOSSES)
        if self.sft_steps < 0:
            raise ConfigError(f"trb.sft_steps must be >= 0 (steps of supervised fine-tuning), got {self.sft_steps}.")
        try:
            check_value("trb.data_share", self.data_share, Parameter(0, 1))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        _check_weights(self.distill_weight, self.reward_weight, self.sft_steps)


def _check_weights(distill: Any, reward: Any, sft_steps: int) -> None:
    """Both are numbers or schedules >= 0, never 0 together; rewards of teacher rollouts are not trained on."""
    try:
        check_value("trb.distill_weight", distill, Parameter(low=0))
        check_value("trb.reward_weight", reward, Parameter(low=0))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    # Linear in between, so both can be 0 only where they are at one of these steps too.
    ends = {max(1, int(step)) for value in (distill, reward) if isinstance(value, list) for step, _ in value}
    for step in sorted({1, *ends}):
        if value_at(distill, step) == value_at(reward, step) == 0:
            raise ConfigError(
                f"trb.distill_weight and trb.reward_weight are both 0 at step {step}: nothing is trained."
            )
    for step in range(1, sft_steps + 1):
        if value_at(reward, step) > 0:
            raise ConfigError(
                f"trb.reward_weight is {value_at(reward, step):g} at step {step}, but the first trb.sft_steps="
                f"{sft_steps} steps are supervised fine-tuning on the teacher's rollouts; let it rise later."
            )


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
    sections: dict[str, Any] = {"teacher": TeacherConfig, "warn": WarnConfig}
    return [*own, *(f"trb.{key}.{name}" for key, cls in sections.items() for name in cls.__dataclass_fields__)]


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
SCHEMA = OmegaConf.structured(TrbConfig)
for _name in ("policy_params", "divergence_params"):
    OmegaConf.set_struct(SCHEMA[_name], False)  # a command may name any parameter; the policy or loss knows which exist
ConfigStore.instance().store(group="trb", name="schema", node=SCHEMA, package="trb", provider="verl_trb")
