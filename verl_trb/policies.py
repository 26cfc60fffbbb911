"""Rollout policies: functions from (log pi_S, log pi_T, parameters) to the distribution rollouts are drawn from.

A new policy is a ten-line file, used with trb.policy=FILE:NAME:

    @register_policy("either", weight=Parameter(0, 1, above=True))
    def either(logp_student_NV, logp_teacher_NV, *, weight=1.0):
        log_mu_NV = torch.maximum(logp_student_NV, logp_teacher_NV + math.log(weight)).log_softmax(-1)
        return from_log_mu(log_mu_NV, logp_student_NV)

The coupling (coupling.py) makes an exact rollout out of any of them. A policy sees guided prefixes only, all with the
same values of its parameters: the sampler draws the others from the student. -inf is probability 0; tokens that are
masked are -inf in both models. Shapes: N prefixes, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from verl_trb.bits import exp
from verl_trb.parameters import Parameter, find, parameters_of
from verl_trb.trust_region import Blend, blend
from verl_trb.vocabulary import SharedVocabulary, canonicalize

STUDENT, TEACHER = "student", "teacher"


@dataclass(frozen=True)
class Policy:
    """A registered rollout policy; call it as `policy(logp_student_NV, logp_teacher_NV, **values)`.

    parameters: by name, the required ones and those with a value in `defaults`.
    needs_teacher: False lets the engine skip the teacher's forward pass.
    warmup: without trb.guided_steps it guides the first trb.warmup_steps steps, epsilon falling to 0; other policies
      guide the whole run.
    marks_corrections: rollouts tell the trainer which of their tokens are corrections, see rollout/sampler.py.
    weightable: pi_S / mu is fit to be an importance weight; False where mu all but excludes tokens that the student
      likes, so that few rollouts would carry nearly all the weight.
    """

    name: str
    rule: Callable[..., Blend]
    parameters: dict[str, Parameter]
    defaults: dict[str, float] = field(default_factory=dict)
    needs_teacher: bool = True
    warmup: bool = False
    marks_corrections: bool = False
    weightable: bool = True

    def __call__(self, logp_student_NV: Tensor, logp_teacher_NV: Tensor, **values: float) -> Blend:
        return self.rule(logp_student_NV, logp_teacher_NV, **values)


_POLICIES: dict[str, Policy] = {}


def register_policy(
    name: str,
    *,
    needs_teacher: bool = True,
    warmup: bool = False,
    marks_corrections: bool = False,
    weightable: bool = True,
    **ranges: Parameter,
) -> Callable[[Callable[..., Blend]], Callable[..., Blend]]:
    """Decorator that makes a function available as `trb.policy=name`.

    Its keyword-only arguments are the policy's parameters; `ranges` says which values they take (any finite number
    for those it leaves out). Raises ValueError if the name is taken.
    """

    def register(rule: Callable[..., Blend]) -> Callable[..., Blend]:
        if name in _POLICIES:
            raise ValueError(f"The rollout policy {name!r} is registered already; choose another name.")
        parameters, defaults = parameters_of(rule, ranges)
        kinds = (needs_teacher, warmup, marks_corrections, weightable)
        _POLICIES[name] = Policy(name, rule, parameters, defaults, *kinds)
        return rule

    return register


def get_policy(name: str) -> Policy:
    """The policy of that name, or after running a file of the user's: FILE.py:NAME.

    Raises ValueError, with the names that come near, if there is none, or if the file cannot be run.
    """
    return find(_POLICIES, "rollout policy", name)


def policy_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_POLICIES)


@torch.no_grad()
def from_log_mu(log_mu_NV: Tensor, logp_student_NV: Tensor, beta: float = math.nan) -> Blend:
    """A policy's distribution as a Blend, with KL(mu || pi_S) in nats per row computed.

    log_mu_NV: normalized log-probabilities; -inf is probability 0. KL is inf where mu has mass and pi_S none.
    beta: the teacher's weight, NaN for policies that have none.
    """
    log_mu_NV, logp_NV = _at_least_float32(log_mu_NV, logp_student_NV)
    mu_NV = exp(log_mu_NV)
    gap_NV = (log_mu_NV - logp_NV).masked_fill_(mu_NV == 0, 0)
    kl_N = (mu_NV * gap_NV).sum(-1).clamp_min(0)
    return Blend(log_mu_NV, torch.full_like(kl_N, beta), kl_N)


def guided(
    policy: Policy,
    params_N: Sequence[dict[str, float] | None],
    logp_student_NV: Tensor,
    logp_teacher_NV: Tensor | None,
) -> Blend:
    """mu at every position: the policy's where there are parameters, elsewhere pi_S, bitwise, with beta = KL = 0.

    The policy is called once for each set of values that occurs; nearly always that is one for the whole batch.
    logp_teacher_NV: None while the teacher is skipped. Raises RuntimeError if a guided position needs it then.
    """
    groups: dict[tuple[tuple[str, float], ...], list[int]] = {}
    for n, params in enumerate(params_N):
        if params is not None:
            groups.setdefault(tuple(params.items()), []).append(n)
    if not groups:
        zero_N = torch.zeros_like(logp_student_NV[:, 0])
        return Blend(logp_student_NV, zero_N, zero_N)
    if logp_teacher_NV is None:
        if policy.needs_teacher:
            raise RuntimeError(f"a request guided by {policy.name!r} reached the engine while the teacher was skipped")
        logp_teacher_NV = logp_student_NV
    if len(groups) == 1 and len(params_N) == sum(map(len, groups.values())):
        (values,) = groups
        return policy(logp_student_NV, logp_teacher_NV, **dict(values))
    log_mu_NV = logp_student_NV.clone()
    beta_N, kl_N = torch.zeros_like(log_mu_NV[:, 0]), torch.zeros_like(log_mu_NV[:, 0])
    for values, rows in groups.items():
        blended = policy(logp_student_NV[rows], logp_teacher_NV[rows], **dict(values))
        log_mu_NV[rows], beta_N[rows], kl_N[rows] = blended
    return Blend(log_mu_NV, beta_N, kl_N)


@torch.no_grad()
def behavior(
    policy: Policy,
    params_N: Sequence[dict[str, float] | None],
    logp_student_NV: Tensor,
    teacher_logits_NV: Tensor | None,
    *,
    vocabulary: SharedVocabulary,
    temperature_N: Tensor | None = None,
) -> Blend:
    """`guided`, from the teacher's logits as its output layer gives them: [N, at least V], None while it is skipped.

    temperature_N: divides the teacher's logits. On a GPU one kernel does all of it for a trust region, whatever
    epsilon each position has (kernels/trust_region_triton.py).
    """
    if teacher_logits_NV is None:
        return guided(policy, params_N, logp_student_NV, None)
    if policy.rule is trb and logp_student_NV.is_cuda and logp_student_NV.dtype != torch.float64:
        from verl_trb.kernels.trust_region_triton import blend_logits

        epsilons = [params["epsilon"] if params is not None else 0.0 for params in params_N]
        epsilon_N = torch.tensor(epsilons, device=logp_student_NV.device)
        blended, _ = blend_logits(
            logp_student_NV, teacher_logits_NV, epsilon_N, vocabulary=vocabulary, temperature_N=temperature_N
        )
        return blended
    logp_teacher_NV = teacher_logprobs(teacher_logits_NV, vocabulary, temperature_N)
    return guided(policy, params_N, logp_student_NV, logp_teacher_NV)


def teacher_logprobs(logits_NV: Tensor, vocabulary: SharedVocabulary, temperature_N: Tensor | None = None) -> Tensor:
    """log pi_T over the shared vocabulary, float32, of the logits as the teacher's output layer gives them."""
    logits_NV = logits_NV[:, : vocabulary.size]
    # Dividing by float32 makes float32 of any logits, without a copy before.
    own_NV = logits_NV.float() if temperature_N is None else logits_NV / temperature_N.float()[:, None]
    shared_NV = canonicalize(own_NV, vocabulary, role="teacher", inplace=own_NV is not logits_NV)
    return torch.log_softmax(shared_NV, -1, out=shared_NV)


# ------------------------------------------------------------------------------------------ the policies


@register_policy(STUDENT, needs_teacher=False)
def student(logp_student_NV: Tensor, logp_teacher_NV: Tensor) -> Blend:
    """Vanilla on-policy distillation: rollouts from the student."""
    return blend(logp_student_NV, logp_teacher_NV, 0.0)


EPSILON = Parameter(low=0, student_at=0)


@register_policy("trb", warmup=True, epsilon=EPSILON)
def trb(logp_student_NV: Tensor, logp_teacher_NV: Tensor, *, epsilon: float) -> Blend:
    """Trust-region behavior blending (arXiv 2605.31159): nearest to the teacher within KL <= epsilon, annealed."""
    return blend(logp_student_NV, logp_teacher_NV, epsilon)


# The paper's control: the same rule at one epsilon for the whole run.
register_policy("fixed_epsilon", epsilon=EPSILON)(trb)

# SAKI (arXiv 2609.36601): TRB's rollouts; the loss differs where the coupling replaced the student's draft.
register_policy("saki", warmup=True, marks_corrections=True, epsilon=EPSILON)(trb)


@register_policy("fixed_beta", beta=Parameter(0, 1, student_at=0))
def fixed_beta(logp_student_NV: Tensor, logp_teacher_NV: Tensor, *, beta: float) -> Blend:
    """mu = pi_S^(1-beta) pi_T^beta / Z with one beta everywhere: TRB without a trust region.

    0 where either model gives 0 (for beta in (0, 1)); pi_S or pi_T at the ends; the student where the two have no
    token in common.
    """
    logp_S_NV, logp_T_NV = _at_least_float32(logp_student_NV, logp_teacher_NV)
    if beta in (0, 1):
        return from_log_mu(logp_T_NV if beta == 1 else logp_S_NV, logp_S_NV, beta)
    mixed_NV = (1 - beta) * logp_S_NV + beta * logp_T_NV
    apart_N1 = (mixed_NV == -math.inf).all(-1, keepdim=True)
    return from_log_mu(torch.where(apart_N1, logp_S_NV, mixed_NV).log_softmax(-1), logp_S_NV, beta)


@register_policy("teacher_mix", alpha=Parameter(0, 1, student_at=0))
def teacher_mix(logp_student_NV: Tensor, logp_teacher_NV: Tensor, *, alpha: float = 0.2) -> Blend:
    """MiniLLM's rollouts (arXiv 2306.08543): mu = alpha pi_T + (1 - alpha) pi_S."""
    logp_S_NV, logp_T_NV = _at_least_float32(logp_student_NV, logp_teacher_NV)
    return from_log_mu(torch.logaddexp(logp_S_NV + _log(1 - alpha), logp_T_NV + _log(alpha)), logp_S_NV)


@register_policy(TEACHER, weightable=False)
def teacher(logp_student_NV: Tensor, logp_teacher_NV: Tensor) -> Blend:
    """Rollouts from the teacher alone: mu = pi_T."""
    return from_log_mu(logp_teacher_NV, logp_student_NV, beta=1.0)


@register_policy("skd", weightable=False, k=Parameter(low=1, whole=True), temperature=Parameter(low=0, above=True))
def skd(logp_student_NV: Tensor, logp_teacher_NV: Tensor, *, k: int = 25, temperature: float = 1.0) -> Blend:
    """Speculative knowledge distillation (arXiv 2410.11325): keep the student's token if it is among the teacher's k
    most likely, else draw from pi_T^(1/temperature), normalized. As a distribution

        mu = pi_S 1[top-k] + pi_S(outside) pi_T^(1/temperature) / Z

    Of equally likely tokens the lower ids are in the top-k; tokens the teacher gives 0 never are. Raises ValueError
    for k > V.
    """
    logp_S_NV, logp_T_NV = _at_least_float32(logp_student_NV, logp_teacher_NV)
    if k > logp_T_NV.shape[-1]:
        raise ValueError(f"k must be at most the vocabulary's size {logp_T_NV.shape[-1]}, but is {k}.")
    top_NV = _top_k(logp_T_NV, int(k))
    log_outside_N1 = logp_S_NV.masked_fill(top_NV, -math.inf).logsumexp(-1, keepdim=True)
    resampled_NV = (logp_T_NV / temperature).log_softmax(-1) + log_outside_N1
    return from_log_mu(torch.logaddexp(logp_S_NV.masked_fill(~top_NV, -math.inf), resampled_NV), logp_S_NV)


@register_policy("temperature", needs_teacher=False, temperature=Parameter(low=0, above=True, student_at=1))
def temperature(logp_student_NV: Tensor, logp_teacher_NV: Tensor, *, temperature: float) -> Blend:
    """The student at another temperature, mu = pi_S^(1/temperature) / Z; the teacher is not asked."""
    (logp_S_NV,) = _at_least_float32(logp_student_NV)
    return from_log_mu((logp_S_NV / temperature).log_softmax(-1), logp_S_NV)


def _top_k(logp_NV: Tensor, k: int) -> Tensor:
    """Mask of each row's k most likely tokens: of ties the lowest ids, whatever the device's topk does; no -inf."""
    least_N1 = logp_NV.topk(k).values[:, -1:]
    above_NV, tied_NV = logp_NV > least_N1, (logp_NV == least_N1) & (logp_NV > -math.inf)
    room_N1 = k - above_NV.sum(-1, keepdim=True)
    return above_NV | (tied_NV & (tied_NV.cumsum(-1) <= room_N1))


def _at_least_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x if x.dtype == torch.float64 else x.float() for x in tensors)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
