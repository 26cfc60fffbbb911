"""From the settings to a training step's rollouts: guided or the student's own, and the policy's parameters.

Pure functions of the `trb` settings and the global step, so that resuming a run needs no state of theirs.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any

from omegaconf import OmegaConf

from verl_trb.parameters import check_value, value_at
from verl_trb.parameters import describe as describe_value
from verl_trb.policies import STUDENT, TEACHER, Policy, get_policy
from verl_trb.schedules import annealed_epsilon

PARAMS = "trb.policy_params"
FOREVER = 2**62  # a step behind every schedule's last point


def guidance(trb: Any, step: int, validate: bool = False) -> dict[str, float] | None:
    """The values of the policy's parameters at a training step (counted from 1); None where rollouts are the
    student's own: in validation, after trb.guided_steps, and where a value makes the policy the student.

    The first trb.sft_steps are fine-tuning on rollouts of the teacher's, a policy without parameters. Later a
    parameter `epsilon` is trb.epsilon unless trb.policy_params sets it: for warm-up policies annealed over
    trb.warmup_steps (`annealed_epsilon`), for others constant.
    """
    if step <= trb.sft_steps and not validate:
        return {}
    policy, last = get_policy(trb.policy), last_guided_step(trb)
    if validate or policy.name == STUDENT or (last is not None and step > last):
        return None
    values = policy.defaults | {name: value_at(value, step) for name, value in _given(trb).items()}
    if "epsilon" in policy.parameters and "epsilon" not in _given(trb):
        values["epsilon"] = annealed_epsilon(step, trb.epsilon, trb.warmup_steps) if policy.warmup else trb.epsilon
    unguided = any(values[name] == parameter.student_at for name, parameter in policy.parameters.items())
    return None if unguided else values


def step_policy(trb: Any, step: int) -> str:
    """The name of the policy that guides a training step's rollouts."""
    return TEACHER if step <= trb.sft_steps else trb.policy


def last_guided_step(trb: Any) -> int | None:
    """The step after which rollouts are the student's own by trb.guided_steps or trb.warmup_steps; None: never."""
    return trb.warmup_steps if trb.guided_steps is None and get_policy(trb.policy).warmup else trb.guided_steps


def needs_teacher(trb: Any, step: int) -> bool:
    """Whether the rollouts of a training step need the teacher."""
    return guidance(trb, step) is not None and get_policy(step_policy(trb, step)).needs_teacher


def last_teacher_step(trb: Any, total_steps: int) -> int:
    """The last of `total_steps` training steps whose rollouts need the teacher; 0: none."""
    return next((step for step in range(total_steps, 0, -1) if needs_teacher(trb, step)), 0)


def guidance_metrics(trb: Any, step: int) -> dict[str, float]:
    """What is logged of a training step: trb/epsilon (0 where rollouts are the student's own, absent for policies
    without), and trb/param/<name> for the other parameters while they guide.
    """
    values = guidance(trb, step)
    if values is None:
        return {"trb/epsilon": 0.0}
    return {"trb/epsilon" if name == "epsilon" else f"trb/param/{name}": float(v) for name, v in values.items()}


def check_guidance(trb: Any) -> None:
    """Raises ValueError, one sentence, for an unknown policy or for parameters that it does not take."""
    policy, given = get_policy(trb.policy), _given(trb)
    for name, value in given.items():
        if name not in policy.parameters:
            raise ValueError(_unknown(policy, name))
        check_value(f"{PARAMS}.{name}", value, policy.parameters[name])
    for name, parameter in policy.parameters.items():
        if name not in given and name not in policy.defaults and name != "epsilon":
            raise ValueError(f"The rollout policy {policy.name!r} needs {PARAMS}.{name}, {parameter}.")
    if policy.name == STUDENT and trb.guided_steps is not None:
        raise ValueError(f"trb.guided_steps={trb.guided_steps} guides nothing with trb.policy={STUDENT}; remove it.")
    if trb.release_teacher and needs_teacher(trb, FOREVER):
        raise ValueError(
            f"trb.release_teacher=true never frees anything: trb.policy={policy.name} asks the teacher to the end of "
            "the run; remove it, or set trb.guided_steps."
        )


def check_idle(trb: Any, named: Collection[str]) -> None:
    """Raises ValueError if a setting that the command names (`named`, dotted keys) would do nothing."""
    policy = get_policy(trb.policy)
    if "epsilon" not in policy.parameters:
        reason = f"trb.policy={policy.name} has no epsilon"
        idle = {"trb.epsilon": reason, "trb.warmup_steps": f"{reason} to anneal"}
    elif "epsilon" in _given(trb):
        reason = f"{PARAMS}.epsilon stands in its place"
        idle = {"trb.epsilon": reason, "trb.warmup_steps": reason} if trb.guided_steps else {"trb.epsilon": reason}
    else:
        idle = {} if policy.warmup else {"trb.warmup_steps": f"trb.policy={policy.name} keeps its epsilon"}
    if trb.loss != "topk":
        idle["trb.topk"] = f"trb.loss={trb.loss} is over no such selection"
    for key, reason in idle.items():
        if key in named:
            raise ValueError(f"{key} would do nothing, because {reason}; remove it.")


def check_vocabulary(trb: Any, size: int) -> None:
    """Raises ValueError if the policy's k, or that of the top-k loss, is larger than the vocabulary; other faults are
    `check_guidance`'s.
    """
    if trb.loss == "topk" and trb.topk > size:
        raise ValueError(f"trb.topk={trb.topk} is larger than the vocabulary of {size} tokens that the models share.")
    try:
        check_guidance(trb)
    except ValueError:
        return
    k = _given(trb).get("k", get_policy(trb.policy).defaults.get("k"))
    if k is not None and k > size:
        raise ValueError(f"{PARAMS}.k={k} is larger than the vocabulary of {size} tokens that the models share.")


def describe(trb: Any) -> str:
    """The policy and its settings in one phrase, for the screen."""
    policy, given = get_policy(trb.policy), _given(trb)
    parts = [policy.name]
    for name in policy.parameters:
        value: Any = given.get(name, policy.defaults.get(name))
        if name == "epsilon" and value is None:
            parts += [f"ε₀ = {trb.epsilon:g}, K = {trb.warmup_steps}" if policy.warmup else f"ε = {trb.epsilon:g}"]
        else:
            parts += [f"{name} {'' if isinstance(value, list) else '= '}{describe_value(value)}"]
    if trb.guided_steps is not None:
        parts += [f"guided until step {trb.guided_steps}"]
    return ", ".join(parts)


def _given(trb: Any) -> dict[str, Any]:
    params = trb.policy_params
    return OmegaConf.to_container(params, resolve=True) if OmegaConf.is_config(params) else dict(params)


def _unknown(policy: Policy, name: str) -> str:
    if not policy.parameters:
        return f"{PARAMS}.{name}: the rollout policy {policy.name!r} takes no parameters."
    near = difflib.get_close_matches(name, policy.parameters, n=2)
    hint = f"did you mean {' or '.join(near)}?" if near else f"it takes {', '.join(policy.parameters)}."
    return f"{PARAMS}.{name}: the rollout policy {policy.name!r} has no parameter {name!r}; {hint}"
