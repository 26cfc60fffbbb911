"""Naive float64 references: what the method says, written as plainly as possible, with none of its code."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p || q) by the textbook sum; 0 log 0 = 0."""
    total = 0.0
    for a, b in zip(p, q, strict=True):
        if a > 0:
            total += a * (math.log(a) - math.log(b)) if b > 0 else math.inf
    return total


def geometric(p_student: np.ndarray, p_teacher: np.ndarray, beta: float) -> np.ndarray | None:
    """pi_S^(1-beta) pi_T^beta / Z, 0 where the student is 0; None if nothing is left."""
    if beta == 0:
        return p_student
    mu = np.zeros_like(p_student)
    both = (p_student > 0) & (p_teacher > 0)
    if not both.any():
        return None
    log_mu = (1 - beta) * np.log(p_student[both]) + beta * np.log(p_teacher[both])
    mu[both] = np.exp(log_mu - log_mu.max())
    return mu / mu.sum()


def bisect_beta(p_student: np.ndarray, p_teacher: np.ndarray, epsilon: float) -> float:
    """The largest beta in [0, 1] with KL(mu_beta || pi_S) <= epsilon, by plain bisection."""

    def fits(beta: float) -> bool:
        mu = geometric(p_student, p_teacher, beta)
        return mu is not None and kl_fast(mu, p_student) <= epsilon

    if epsilon == 0:
        return 0.0
    if fits(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def kl_fast(p: np.ndarray, q: np.ndarray) -> float:
    """`kl` for long vectors."""
    some = p > 0
    if (q[some] == 0).any():
        return math.inf
    return float((p[some] * (np.log(p[some]) - np.log(q[some]))).sum())


def probabilities(logp: Tensor) -> np.ndarray:
    """float64 probabilities of one row of log-probabilities, renormalized."""
    p = np.exp(logp.double().numpy())
    return p / p.sum()


def reverse_kl(logits_student: Tensor, logits_teacher: Tensor) -> Tensor:
    """KL(pi_S || pi_T) of one row of logits, differentiable; tokens at -inf in the student are left out."""
    live = logits_student > -math.inf
    p = torch.exp(logits_student[live]) / torch.exp(logits_student[live]).sum()
    q = torch.exp(logits_teacher) / torch.exp(logits_teacher).sum()
    return sum((a * (torch.log(a) - torch.log(b)) for a, b in zip(p, q[live], strict=True)), p.new_zeros(()))


def topk_loss(logits_student: Tensor, logits_teacher: Tensor, k: int) -> Tensor:
    """The paper's top-k loss of one row, by its definition: -sum_v A_v ratio_v, with detached A and ratio's
    denominator."""
    p = torch.exp(logits_student) / torch.exp(logits_student).sum()
    q = torch.exp(logits_teacher) / torch.exp(logits_teacher).sum()
    support = sorted(range(len(p)), key=lambda v: -float(p.detach()[v]))[:k]
    mass = sum(float(p.detach()[v]) for v in support)
    loss = p.new_zeros(())
    for v in support:
        constant = float(p[v].detach())
        log_target = math.log(float(q[v])) if q[v] > 0 else -math.inf
        advantage = constant / mass * (log_target - math.log(constant))
        loss = loss - advantage * p[v] / constant
    return loss


def truncated_kl(logits_student: Tensor, logits_teacher: Tensor, k: int) -> Tensor:
    """What the top-k loss is not: sum over the top k of w log(pi_S / pi_T), to be differentiated directly."""
    p = torch.exp(logits_student) / torch.exp(logits_student).sum()
    q = torch.exp(logits_teacher) / torch.exp(logits_teacher).sum()
    support = sorted(range(len(p)), key=lambda v: -float(p.detach()[v]))[:k]
    mass = sum(float(p.detach()[v]) for v in support)
    return sum(p[v] / mass * (torch.log(p[v]) - torch.log(q[v])) for v in support)


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    """p-value of Pearson's test of counts against p; cells expecting fewer than 5 are pooled."""
    from scipy.stats import chi2

    expected = counts.sum() * p
    if counts[p == 0].sum() > 0:
        return 0.0
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    some = expected > 0
    statistic = float(((observed[some] - expected[some]) ** 2 / expected[some]).sum())
    return float(chi2.sf(statistic, some.sum() - 1))
