"""Naive float64 references of the training losses: each by its definition, one row at a time, autograd does the rest.

Every function takes one row of the student's and of the teacher's logits and a Row of what else is known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from oracles import topk_loss
from torch import Tensor


@dataclass
class Row:
    token: int = 0
    corrected: bool = False


def softmax(logits: Tensor) -> list[Tensor]:
    weights = [torch.exp(z) for z in logits]
    return [w / sum(weights) for w in weights]


def kl(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """The textbook sum; 0 log 0 = 0."""
    total = torch.zeros((), dtype=torch.float64)
    for x, y in zip(a, b, strict=True):
        if x > 0:
            total = total + (x * (torch.log(x) - torch.log(y)) if y > 0 else math.inf)
    return total


def mix(weight: float, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    return [weight * x + (1 - weight) * y for x, y in zip(a, b, strict=True)]


def entropy(p: list[Tensor]) -> float:
    return -sum(float(x) * math.log(x) for x in p if x > 0)


def reverse_kl(s: Tensor, t: Tensor, row: Row) -> Tensor:
    return kl(softmax(s), softmax(t))


def forward_kl(s: Tensor, t: Tensor, row: Row) -> Tensor:
    return kl(softmax(t), softmax(s))


def jsd(s: Tensor, t: Tensor, row: Row, beta: float) -> Tensor:
    q, p = softmax(s), softmax(t)
    m = mix(beta, p, q)
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def skew_forward(s: Tensor, t: Tensor, row: Row, alpha: float) -> Tensor:
    q, p = softmax(s), softmax(t)
    return kl(p, mix(alpha, p, q))


def skew_reverse(s: Tensor, t: Tensor, row: Row, alpha: float) -> Tensor:
    q, p = softmax(s), softmax(t)
    return kl(q, mix(1 - alpha, p, q))


def veto_target(s: Tensor, t: Tensor, beta: float) -> list[Tensor]:
    weights = [p * q.detach() ** beta for p, q in zip(softmax(t), softmax(s), strict=True)]
    return [w / sum(weights) for w in weights]


def veto(s: Tensor, t: Tensor, row: Row, beta: float) -> Tensor:
    return kl(softmax(s), veto_target(s, t, beta))


def eopd(s: Tensor, t: Tensor, row: Row, threshold: float, weight: float) -> Tensor:
    loss = reverse_kl(s, t, row)
    return loss + weight * forward_kl(s, t, row) if entropy(softmax(t)) > threshold else loss


def nll(s: Tensor, token: int) -> Tensor:
    return -torch.log(softmax(s)[token])


def saki(s: Tensor, t: Tensor, row: Row) -> Tensor:
    return nll(s, int(t.argmax())) if row.corrected else reverse_kl(s, t, row)


def cross_entropy(s: Tensor, t: Tensor, row: Row) -> Tensor:
    return nll(s, row.token)


def topk_reverse_kl(s: Tensor, t: Tensor, row: Row, k: int) -> Tensor:
    return topk_loss(s, t, k)


def topk_forward_kl(s: Tensor, t: Tensor, row: Row, k: int) -> Tensor:
    q, p = softmax(s), softmax(t)
    support = sorted(range(len(p)), key=lambda v: -float(p[v]))[:k]
    return sum((p[v] * (torch.log(p[v]) - torch.log(q[v])) for v in support), torch.zeros((), dtype=torch.float64))


def topk_veto(s: Tensor, t: Tensor, row: Row, k: int, beta: float) -> Tensor:
    return topk_loss(s, torch.log(torch.stack(veto_target(s, t, beta))), k)


def topk_eopd(s: Tensor, t: Tensor, row: Row, k: int, threshold: float, weight: float) -> Tensor:
    loss = topk_loss(s, t, k)
    return loss + weight * topk_forward_kl(s, t, row, k) if entropy(softmax(t)) > threshold else loss


def topk_saki(s: Tensor, t: Tensor, row: Row, k: int) -> Tensor:
    return nll(s, int(t.argmax())) if row.corrected else topk_loss(s, t, k)


def topk_cross_entropy(s: Tensor, t: Tensor, row: Row, k: int) -> Tensor:
    return nll(s, row.token)


def exopd(s: Tensor, t: Tensor, r: Tensor, scale: float) -> Tensor:
    """KL to the extrapolated target p (p / r)^(scale - 1) / Z: what the advantages descend."""
    weights = [p * (p / x) ** (scale - 1) for p, x in zip(softmax(t), softmax(r), strict=True)]
    return kl(softmax(s), [w / sum(weights) for w in weights])
