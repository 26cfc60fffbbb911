"""Training losses: what is summed over the vocabulary at a visited prefix, and its gradient, written by hand.

q is the student's next-token distribution, p the teacher's. Most losses are a sum over tokens v of a function phi_v of
q(v). Such a loss is two columns: its term phi_v, and its flux q(v) phi_v'(q(v)). The rest follows:

  value              sum_v term_v
  gradient           flux_v - q(v) sum_u flux_u, with respect to the student's logits
  single sample      advantage -flux_v / q(v) of a token v ~ q, an unbiased policy gradient of the same loss

A constant added to phi' changes neither, so derivatives are written without it. A loss is one function:

    @register_divergence("skew_forward", alpha=Parameter(0, 1, above=True, below=True))
    def skew_forward(prefixes, *, alpha=0.1):
        ...
        return Integrand(term_CV, flux_CV)

and is chosen with `trb.divergence=skew_forward`, or FILE.py:NAME in a file of one's own. chunked_loss.py runs it over
many tokens. docs/methods.md lists all.

Shapes: C prefixes, V vocabulary. -inf is probability 0; a token that neither model can emit contributes 0. A divergence
that is infinite (mass of one where the other has none) has the value inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from verl_trb.bits import exp
from verl_trb.parameters import Parameter, find, parameters_of

FULL, TOPK, SAMPLED = "full", "topk", "sampled"


@dataclass
class Prefixes:
    """What a loss may look at. Not to be modified.

    logp_student_CV, logp_teacher_CV: normalized log-probabilities, float32 or float64. In `sampled` mode V is 1: they
      belong to the rollout token alone.
    token_C: int64, the rollout token. corrected_C: bool, where it replaced a rejected draft of the student's.
    logp_reference_CV: of the reference model, `sampled` mode only.
    """

    logp_student_CV: Tensor
    logp_teacher_CV: Tensor
    token_C: Tensor | None = None
    corrected_C: Tensor | None = None
    logp_reference_CV: Tensor | None = None

    @cached_property
    def student_CV(self) -> Tensor:
        return exp(self.logp_student_CV)

    @cached_property
    def student_entropy_C(self) -> Tensor:
        """In nats, like the teacher's."""
        return torch.special.entr(self.student_CV).sum(-1)

    @cached_property
    def teacher_entropy_C(self) -> Tensor:
        return torch.special.entr(exp(self.logp_teacher_CV)).sum(-1)


class Integrand(NamedTuple):
    """A loss over the vocabulary, [C, V] each; both may be one tensor."""

    term_CV: Tensor
    flux_CV: Tensor

    @property
    def value_C(self) -> Tensor:
        return self.term_CV.sum(-1)

    def gradient_CV(self, student_CV: Tensor) -> Tensor:
        """With respect to the student's logits; a new tensor."""
        return torch.addcmul(self.flux_CV, student_CV, self.flux_CV.sum(-1, keepdim=True), value=-1)


# (prefixes, **parameters) -> Integrand; the top-k form of a loss also takes k.
Rule = Callable[..., Integrand]


@dataclass(frozen=True)
class Divergence:
    """A registered loss. modes: by the values of `trb.loss` that it is defined for, the function that computes it.

    parameters: their ranges; defaults: of those that have one; needs: fields of Prefixes it cannot do without.
    """

    name: str
    modes: dict[str, Rule]
    parameters: dict[str, Parameter]
    defaults: dict[str, float]
    needs: tuple[str, ...]

    def rule(self, mode: str, k: int, params: Mapping[str, float]) -> Callable[[Prefixes], Integrand]:
        """The function of the prefixes alone. Raises ValueError for a mode that the loss is not defined for."""
        if mode not in self.modes:
            raise ValueError(f"{self.name} is not defined for loss={mode}, only for {', '.join(self.modes)}.")
        keywords = ({"k": k} if mode == TOPK else {}) | dict(params)
        return partial(self.modes[mode], **keywords) if keywords else self.modes[mode]


_DIVERGENCES: dict[str, Divergence] = {}


def register_divergence(
    name: str,
    *,
    modes: tuple[str, ...] = (FULL, SAMPLED),
    topk: Rule | None = None,
    needs: tuple[str, ...] = (),
    **ranges: Parameter,
) -> Callable[[Rule], Rule]:
    """Decorator that makes a function available as `trb.divergence=name`.

    modes: what the function computes; a function whose flux looks beyond its own token, or is as large as the inverse
      of a probability, has no `sampled` mode. topk: the function of the `topk` mode, if the loss has one.
    ranges: of its keyword-only arguments, which are its parameters. Raises ValueError if the name is taken.
    """

    def register(rule: Rule) -> Rule:
        if name in _DIVERGENCES:
            raise ValueError(f"The divergence {name!r} is registered already; choose another name.")
        rules = dict.fromkeys(modes, rule) | ({TOPK: topk} if topk else {})
        parameters, defaults = parameters_of(rule, ranges)
        _DIVERGENCES[name] = Divergence(name, rules, parameters, defaults, needs)
        return rule

    return register


def get_divergence(name: str) -> Divergence:
    """The loss of that name, or after running a file of the user's: FILE.py:NAME.

    Raises ValueError, with the names that come near, if there is none, or if the file cannot be run.
    """
    return find(_DIVERGENCES, "divergence", name)


def divergence_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_DIVERGENCES)


def sampled_advantage(rule: Callable[[Prefixes], Integrand], prefixes: Prefixes, log_mu_C: Tensor) -> Tensor:
    """The advantage of rollout tokens drawn from mu, -flux / mu, [C], without gradient.

    The mean of advantage * grad log q(token) is minus the gradient of the loss at the visited prefixes: -flux / q
    would be the advantage under q, and q / mu is the importance weight. For reverse KL that is the weighted
    log-ratio, q / mu (log p - log q); without the weight the gradient is biased.

    prefixes: log-probabilities of the rollout tokens, [C, 1]; log_mu_C: of what they were drawn from.
    """
    with torch.no_grad():
        return -rule(prefixes).flux_CV.squeeze(-1) * (-log_mu_C).exp()


# ------------------------------------------------------------------------------------------ top-k forms


def topk_reverse_kl(prefixes: Prefixes, k: int) -> Integrand:
    """The paper's top-k loss, -sum_v A_v ratio_v (arXiv 2605.31159 with 2604.13016).

    v runs over the student's k most likely tokens; w = q renormalized on them, A_v = w_v (log p(v) - log q(v)) is a
    constant, ratio_v = q(v) / stop_gradient(q(v)) = 1. So the gradient is -sum_v A_v (e_v - q): *not* the one of
    sum_v w_v (log q(v) - log p(v)) differentiated directly.
    """
    return _topk_to_target(prefixes, prefixes.logp_teacher_CV, k)


def topk_forward_kl(prefixes: Prefixes, k: int) -> Integrand:
    """sum_v p(v) (log p(v) - log q(v)) over the teacher's k most likely tokens, nothing renormalized.

    It can be negative, and at q = p its gradient is not 0: it moves mass into the support.
    """
    top_CK, index_CK = prefixes.logp_teacher_CV.topk(min(k, prefixes.logp_teacher_CV.shape[-1]), dim=-1)
    p_CK = top_CK.exp()
    gap_CK = (top_CK - prefixes.logp_student_CV.gather(-1, index_CK)).masked_fill_(top_CK == -math.inf, 0)
    zeros_CV = torch.zeros_like(prefixes.logp_student_CV)
    return Integrand(zeros_CV.scatter(-1, index_CK, p_CK * gap_CK), zeros_CV.scatter_(-1, index_CK, -p_CK))


def _topk_to_target(prefixes: Prefixes, log_target_CV: Tensor, k: int) -> Integrand:
    index_CK = prefixes.logp_student_CV.topk(min(k, prefixes.logp_student_CV.shape[-1]), dim=-1).indices
    return top_reverse_kl(prefixes.logp_student_CV, index_CK, log_target_CV.gather(-1, index_CK))


def top_reverse_kl(logp_student_CV: Tensor, index_CK: Tensor, log_target_CK: Tensor) -> Integrand:
    """`topk_reverse_kl` on given tokens, index_CK, of which the target's log-probabilities are known."""
    top_CK = logp_student_CV.gather(-1, index_CK)
    gap_CK = (top_CK - log_target_CK).masked_fill_(top_CK == -math.inf, 0)
    column_CV = torch.zeros_like(logp_student_CV).scatter_(-1, index_CK, top_CK.softmax(-1) * gap_CK)
    return Integrand(column_CV, column_CV)


# ------------------------------------------------------------------------------------------ the losses


@register_divergence("reverse_kl", topk=topk_reverse_kl)
def reverse_kl(prefixes: Prefixes) -> Integrand:
    """KL(q || p), the paper's."""
    column_CV = prefixes.student_CV * _gap(prefixes.logp_student_CV, prefixes.logp_teacher_CV)
    return Integrand(column_CV, column_CV)


@register_divergence("forward_kl", modes=(FULL,), topk=topk_forward_kl)
def forward_kl(prefixes: Prefixes) -> Integrand:
    """KL(p || q)."""
    p_CV = exp(prefixes.logp_teacher_CV)
    return Integrand(p_CV * _gap(prefixes.logp_teacher_CV, prefixes.logp_student_CV), -p_CV)


@register_divergence("jsd", beta=Parameter(0, 1, above=True, below=True))
def jsd(prefixes: Prefixes, *, beta: float = 0.5) -> Integrand:
    """GKD's generalized Jensen-Shannon divergence (arXiv 2306.13649): beta KL(p || M) + (1 - beta) KL(q || M) with
    M = beta p + (1 - beta) q.

    As the paper defines it: it vanishes towards both ends, where JSD / beta -> KL(p || q) for beta -> 0 and
    JSD / (1 - beta) -> KL(q || p) for beta -> 1.
    """
    logp_CV, logq_CV = prefixes.logp_teacher_CV, prefixes.logp_student_CV
    log_m_CV = torch.logaddexp(logp_CV + math.log(beta), logq_CV + math.log(1 - beta))
    flux_CV = (prefixes.student_CV * _gap(logq_CV, log_m_CV)).mul_(1 - beta)
    return Integrand((exp(logp_CV) * _gap(logp_CV, log_m_CV)).mul_(beta).add_(flux_CV), flux_CV)


@register_divergence("skew_forward", alpha=Parameter(0, 1, above=True, below=True))
def skew_forward(prefixes: Prefixes, *, alpha: float = 0.1) -> Integrand:
    """DistiLLM's skew KL (arXiv 2402.03898): KL(p || alpha p + (1 - alpha) q)."""
    logp_CV, logq_CV = prefixes.logp_teacher_CV, prefixes.logp_student_CV
    log_m_CV = torch.logaddexp(logp_CV + math.log(alpha), logq_CV + math.log(1 - alpha))
    gap_CV = _gap(logp_CV, log_m_CV)
    flux_CV = (prefixes.student_CV * exp(gap_CV)).mul_(alpha - 1)  # gap is at most -log(alpha)
    return Integrand(exp(logp_CV) * gap_CV, flux_CV.masked_fill_(logp_CV == -math.inf, 0))


@register_divergence("skew_reverse", alpha=Parameter(0, 1, above=True, below=True))
def skew_reverse(prefixes: Prefixes, *, alpha: float = 0.1) -> Integrand:
    """DistiLLM's skew reverse KL (arXiv 2402.03898): KL(q || (1 - alpha) p + alpha q)."""
    logp_CV, logq_CV = prefixes.logp_teacher_CV, prefixes.logp_student_CV
    log_m_CV = torch.logaddexp(logp_CV + math.log(1 - alpha), logq_CV + math.log(alpha))
    gap_CV = _gap(logq_CV, log_m_CV)
    return Integrand(prefixes.student_CV * gap_CV, prefixes.student_CV * (gap_CV - alpha * exp(gap_CV)))


def _topk_veto(prefixes: Prefixes, k: int, *, beta: float = 0.5) -> Integrand:
    log_target_CV = _veto_target(prefixes, beta)
    return _topk_to_target(prefixes, log_target_CV - log_target_CV.logsumexp(-1, keepdim=True), k)


@register_divergence("veto", topk=_topk_veto, beta=Parameter(0, 1))
def veto(prefixes: Prefixes, *, beta: float = 0.5) -> Integrand:
    """Veto (arXiv 2601.07155): KL(q || t) to the geometric target t ~ p q^beta, a constant in the gradient.

    So its advantage is log p - (1 - beta) log q, as in the paper. At q = p it is 0 only for beta = 0: the optimum
    p^(1 / (1 - beta)) is sharper than the teacher.
    """
    log_target_CV = _veto_target(prefixes, beta)
    flux_CV = prefixes.student_CV * _gap(prefixes.logp_student_CV, log_target_CV)
    return Integrand(flux_CV + prefixes.student_CV * log_target_CV.logsumexp(-1, keepdim=True), flux_CV)


def _veto_target(prefixes: Prefixes, beta: float) -> Tensor:
    """log p + beta log q, not normalized."""
    if beta == 0:  # 0 * -inf
        return prefixes.logp_teacher_CV
    return torch.add(prefixes.logp_teacher_CV, prefixes.logp_student_CV, alpha=beta)


def _topk_eopd(prefixes: Prefixes, k: int, *, threshold: float = 0.8, weight: float = 1.0) -> Integrand:
    return _entropy_aware(prefixes, topk_reverse_kl(prefixes, k), topk_forward_kl(prefixes, k), threshold, weight)


@register_divergence("eopd", modes=(FULL,), topk=_topk_eopd, threshold=Parameter(0), weight=Parameter(0))
def eopd(prefixes: Prefixes, *, threshold: float = 0.8, weight: float = 1.0) -> Integrand:
    """Entropy-aware on-policy distillation (arXiv 2603.07079): KL(q || p), plus weight KL(p || q) where the teacher's
    entropy is above `threshold` nats.
    """
    return _entropy_aware(prefixes, reverse_kl(prefixes), forward_kl(prefixes), threshold, weight)


def _entropy_aware(
    prefixes: Prefixes, reverse: Integrand, forward: Integrand, threshold: float, weight: float
) -> Integrand:
    sure_C1 = (prefixes.teacher_entropy_C <= threshold).unsqueeze(-1)
    return Integrand(*(r + weight * f.masked_fill(sure_C1, 0) for r, f in zip(reverse, forward, strict=True)))


@register_divergence("exopd", modes=(SAMPLED,), needs=("logp_reference_CV",), scale=Parameter(0))
def exopd(prefixes: Prefixes, *, scale: float = 1.25) -> Integrand:
    """G-OPD, and ExOPD for scale > 1 (arXiv 2602.12125): the advantage log p - log q + (scale - 1)(log p - log r)
    with the reference r, the student before training. `scale` is the paper's lambda.
    """
    assert prefixes.logp_reference_CV is not None, "exopd needs the reference model's log-probabilities"
    extra_CV = (scale - 1) * _gap(prefixes.logp_teacher_CV, prefixes.logp_reference_CV)
    column_CV = prefixes.student_CV * (_gap(prefixes.logp_student_CV, prefixes.logp_teacher_CV) - extra_CV)
    return Integrand(column_CV, column_CV)


def _topk_saki(prefixes: Prefixes, k: int) -> Integrand:
    return _corrected(prefixes, topk_reverse_kl(prefixes, k))


@register_divergence("saki", modes=(FULL,), topk=_topk_saki, needs=("corrected_C",))
def saki(prefixes: Prefixes) -> Integrand:
    """SAKI (arXiv 2609.36601): KL(q || p), but -log q of the teacher's most likely token where the rollout token
    replaced a rejected draft. There it is not 0 at q = p.
    """
    return _corrected(prefixes, reverse_kl(prefixes))


def _corrected(prefixes: Prefixes, elsewhere: Integrand) -> Integrand:
    assert prefixes.corrected_C is not None, "saki needs to know which tokens are corrections"
    corrected_C1 = prefixes.corrected_C.unsqueeze(-1)
    likelihood = _negative_log_likelihood(prefixes, prefixes.logp_teacher_CV.argmax(-1))
    return Integrand(*(torch.where(corrected_C1, a, b) for a, b in zip(likelihood, elsewhere, strict=True)))


def _topk_cross_entropy(prefixes: Prefixes, k: int) -> Integrand:
    return cross_entropy(prefixes)  # of one token, whatever k


@register_divergence("cross_entropy", modes=(FULL,), topk=_topk_cross_entropy, needs=("token_C",))
def cross_entropy(prefixes: Prefixes) -> Integrand:
    """-log q of the rollout token: supervised fine-tuning on the rollouts. At q = p its mean gradient is 0 only over
    tokens drawn from p.
    """
    assert prefixes.token_C is not None, "cross_entropy needs the rollout tokens"
    return _negative_log_likelihood(prefixes, prefixes.token_C)


def _negative_log_likelihood(prefixes: Prefixes, token_C: Tensor) -> Integrand:
    index_C1 = token_C.unsqueeze(-1)
    zeros_CV = torch.zeros_like(prefixes.logp_student_CV)
    term_CV = zeros_CV.scatter(-1, index_C1, -prefixes.logp_student_CV.gather(-1, index_C1))
    return Integrand(term_CV, zeros_CV.scatter_(-1, index_C1, -1.0))


def _gap(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log a - log b, 0 where a is 0."""
    return (log_a - log_b).masked_fill_(log_a == -math.inf, 0)
