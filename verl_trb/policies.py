"""Rollout policies: functions from (log pi_S, log pi_T, epsilon) to the distribution rollouts are drawn from.

A new policy is a ten-line file imported before the run:

    @register_policy("teacher_mix")
    def teacher_mix(logp_student_NV, logp_teacher_NV, epsilon_N, *, alpha=0.2):
        log_mu_NV = torch.logaddexp(logp_student_NV + math.log(1 - alpha), logp_teacher_NV + math.log(alpha))
        return from_log_mu(log_mu_NV, logp_student_NV)

The coupling (coupling.py) makes an exact rollout out of any of them. Shapes: N prefixes, V vocabulary.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from verl_trb.trust_region import Blend, blend
from verl_trb.vocabulary import SharedVocabulary, canonicalize

# (logp_student_NV, logp_teacher_NV, epsilon_N, **parameters) -> Blend
Policy = Callable[..., Blend]

_POLICIES: dict[str, Policy] = {}


def register_policy(name: str) -> Callable[[Policy], Policy]:
    """Decorator that makes a policy available as `trb.policy=name`; ValueError if the name is taken."""

    def register(policy: Policy) -> Policy:
        if _POLICIES.setdefault(name, policy) is not policy:
            raise ValueError(f"The rollout policy {name!r} is registered already; choose another name.")
        return policy

    return register


def get_policy(name: str) -> Policy:
    """The policy of that name. Raises ValueError, with the names that come near, if there is none."""
    if name not in _POLICIES:
        near = difflib.get_close_matches(str(name), _POLICIES, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {policy_names()}."
        raise ValueError(f"There is no rollout policy {name!r}; {hint}")
    return _POLICIES[name]


def policy_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_POLICIES)


@torch.no_grad()
def behavior(
    name: str,
    logp_student_NV: Tensor,
    teacher_logits_NV: Tensor,
    epsilon_N: Tensor,
    *,
    vocabulary: SharedVocabulary,
    temperature_N: Tensor | None = None,
    **parameters: Any,
) -> Blend:
    """The policy `name`, from the teacher's logits as its output layer gives them, [N, at least V].

    logp_student_NV: normalized over the shared vocabulary. temperature_N: divides the teacher's logits, [N].
    For `trb` on a GPU one kernel does all of it (kernels/trust_region_triton.py). Raises ValueError as `get_policy`.
    """
    if name == "trb" and logp_student_NV.is_cuda and logp_student_NV.dtype != torch.float64:
        from verl_trb.kernels.trust_region_triton import blend_logits

        return blend_logits(
            logp_student_NV,
            teacher_logits_NV,
            epsilon_N,
            vocabulary=vocabulary,
            temperature_N=temperature_N,
            **parameters,
        )[0]
    logits_NV = teacher_logits_NV[:, : vocabulary.size].float()
    if temperature_N is not None:
        logits_NV = logits_NV / temperature_N[:, None]
    logp_teacher_NV = canonicalize(logits_NV, vocabulary, role="teacher").log_softmax(-1)
    return get_policy(name)(logp_student_NV, logp_teacher_NV, epsilon_N, **parameters)


@torch.no_grad()
def from_log_mu(log_mu_NV: Tensor, logp_student_NV: Tensor) -> Blend:
    """A policy's distribution as a Blend: KL(mu || pi_S) in nats per row computed, beta NaN (it has none).

    log_mu_NV: normalized log-probabilities; -inf is probability 0. KL is inf where mu has mass and pi_S none.
    """
    log_mu_NV, logp_NV = (x if x.dtype == torch.float64 else x.float() for x in (log_mu_NV, logp_student_NV))
    gap_NV = (log_mu_NV - logp_NV).masked_fill_(log_mu_NV == -math.inf, 0)
    kl_N = (log_mu_NV.exp() * gap_NV).sum(-1).clamp_min(0)
    return Blend(log_mu_NV, torch.full_like(kl_N, math.nan), kl_N)


@register_policy("student")
def student(logp_student_NV: Tensor, logp_teacher_NV: Tensor, epsilon_N: Tensor | float) -> Blend:
    """Vanilla on-policy distillation: rollouts from the student, whatever the budget."""
    return blend(logp_student_NV, logp_teacher_NV, 0.0)


@register_policy("trb")
def trb(logp_student_NV: Tensor, logp_teacher_NV: Tensor, epsilon_N: Tensor | float) -> Blend:
    """Trust-region behavior blending (arXiv 2605.31159): near the teacher within KL <= epsilon."""
    return blend(logp_student_NV, logp_teacher_NV, epsilon_N)
