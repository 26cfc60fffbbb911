"""From the settings to a training step's objective: which loss, its parameters, and its weight beside the reward's.

Pure functions of the `trb` settings and the global step, so that resuming a run needs no state of theirs.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass
from typing import Any

from omegaconf import OmegaConf

from verl_trb.divergences import FULL, SAMPLED, TOPK, get_divergence
from verl_trb.guidance import needs_teacher
from verl_trb.parameters import check_value, describe, value_at
from verl_trb.verified import HIDDEN_STATES

PARAMS = "trb.divergence_params"
WARM_UP, REVERSE_KL = "cross_entropy", "reverse_kl"


@dataclass(frozen=True)
class Objective:
    """loss = distill_weight * divergence + reward_weight * policy gradient of the reward.

    mode: `full`, `topk` or `sampled`; params: the divergence's, at this step.
    """

    divergence: str
    mode: str
    params: dict[str, float]
    distill_weight: float
    reward_weight: float

    @property
    def distills(self) -> bool:
        """The teacher is read at all."""
        return self.distill_weight > 0

    @property
    def samples(self) -> bool:
        """The distillation term is a policy gradient of the rollout tokens."""
        return self.distills and self.mode == SAMPLED

    @property
    def policy_gradient(self) -> bool:
        """Log-probabilities of the student before the update are needed."""
        return self.samples or self.reward_weight > 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def step_objective(trb: Any, step: int) -> Objective:
    """The objective of a training step, counted from 1. The first trb.sft_steps are supervised fine-tuning on the
    rollouts.
    """
    weights = value_at(_plain(trb.distill_weight), step), value_at(_plain(trb.reward_weight), step)
    if step <= trb.sft_steps:
        return Objective(WARM_UP, FULL, {}, *weights)
    divergence = get_divergence(trb.divergence)
    params = divergence.defaults | {
        name: value_at(value, step) for name, value in _plain(trb.divergence_params).items()
    }
    return Objective(trb.divergence, trb.loss, params, *weights)  # with its file, which the workers run too


def objective_metrics(objective: Objective) -> dict[str, float]:
    """What is logged of a step's objective."""
    metrics = {f"trb/loss_param/{name}": float(value) for name, value in objective.params.items()}
    return metrics | {
        "trb/distill_weight": objective.distill_weight,
        "trb/reward_weight": objective.reward_weight,
    }


def ever_rewards(trb: Any) -> bool:
    """The reward is trained on at some step."""
    weight = _plain(trb.reward_weight)
    return any(value > 0 for _, value in weight) if isinstance(weight, list) else weight > 0


def reused_of_teacher(trb: Any, step: int) -> int | None:
    """What a training step takes from verification (verified.py) instead of reading the teacher again: of the top-k
    reverse KL k, of all other losses HIDDEN_STATES, nothing None.
    """
    if not trb.reuse_verification or not needs_teacher(trb, step):  # first: every rollout asks
        return None
    objective = step_objective(trb, step)
    if not objective.distills:
        return None
    few = objective.mode == TOPK and objective.divergence == REVERSE_KL
    return trb.topk if few else HIDDEN_STATES


def needs(trb: Any) -> tuple[str, ...]:
    """Fields of `Prefixes` that the divergence cannot do without."""
    return get_divergence(trb.divergence).needs


def check_objective(trb: Any) -> None:
    """Raises ValueError, one sentence, for a loss that does not exist, that takes other parameters or another mode."""
    divergence, given = get_divergence(trb.divergence), _plain(trb.divergence_params)
    if trb.loss not in divergence.modes:
        raise ValueError(
            f"trb.divergence={divergence.name} is not defined for trb.loss={trb.loss}; "
            f"set trb.loss={' or '.join(divergence.modes)}."
        )
    for name, value in given.items():
        if name not in divergence.parameters:
            near = difflib.get_close_matches(name, divergence.parameters, n=2)
            takes = f"it takes {', '.join(divergence.parameters)}." if divergence.parameters else "it takes none."
            hint = f"did you mean {' or '.join(near)}?" if near else takes
            raise ValueError(f"{PARAMS}.{name}: the divergence {divergence.name!r} has no such parameter; {hint}")
        check_value(f"{PARAMS}.{name}", value, divergence.parameters[name])
    if trb.reuse_verification:
        _check_reuse(trb)


def _check_reuse(trb: Any) -> None:
    if trb.data_share != 0:
        raise ValueError(
            f"trb.reuse_verification=true needs trb.data_share=0, got {_plain(trb.data_share)}: the rollout engine "
            "knows the teacher at tokens that it has verified, not at those of the data."
        )
    if not needs_teacher(trb, 1):
        raise ValueError(
            f"trb.reuse_verification=true would do nothing: trb.policy={trb.policy} verifies nothing with the teacher; "
            "remove it."
        )


def describe_objective(trb: Any) -> str:
    """The objective in one phrase, for the screen."""
    name = get_divergence(trb.divergence).name.replace("_kl", " KL").replace("_", " ")
    params = [f"{key} = {describe(value)}" for key, value in _plain(trb.divergence_params).items()]
    parts = [", ".join([name, *params, trb.loss])]
    if trb.sft_steps:
        parts = [f"cross-entropy for {trb.sft_steps} steps, then {parts[0]}"]
    if ever_rewards(trb):
        weights = describe(_plain(trb.distill_weight)), describe(_plain(trb.reward_weight))
        parts += [f"weight {weights[0]}", f"reward weight {weights[1]}"]
    return "; ".join(parts)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
