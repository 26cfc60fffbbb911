"""The few-sweep reverse KL of rows of logits against autograd in float64."""

from __future__ import annotations

import math

import pytest
import torch

from verl_trb.exact_rows import exact_gradient, exact_rows
from verl_trb.scratch import Scratch

INF = math.inf


def logits(rows=6, size=40, offset=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(rows, size, generator=g, dtype=torch.float64) + shift for shift in (0.0, offset)]


def naive(student, teacher, token, upstream, upstream_logp):
    """KL, entropies and log-probabilities of rows, and the gradient of the weighted sum; autograd, float64."""
    leaf = student.clone().requires_grad_()
    q, p = leaf.softmax(-1), teacher.softmax(-1)
    alive = q > 0
    kl = torch.where(alive, q * (q.clamp_min(1e-300).log() - p.clamp_min(1e-300).log()), 0).sum(-1)
    logp = q.gather(-1, token[:, None]).squeeze(-1).log()
    (kl @ upstream + logp @ upstream_logp).backward()
    entropies = [torch.special.entr(x.detach()).sum(-1) for x in (q, p)]
    return kl.detach(), *entropies, logp.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("offset", [0.0, 50.0])
@pytest.mark.parametrize("masked", [(), (3, 17)])
def test_value_and_gradient(dtype, offset, masked):
    """Also where the teacher's logits are far from normalized, and with tokens that both models mask."""
    student, teacher = logits(offset=offset)
    student[:, list(masked)], teacher[:, list(masked)] = -INF, -INF
    student[0, 5] = -INF  # a token that only the student lacks
    token = torch.tensor([1, 2, 4, 6, 8, 9])
    upstream = torch.tensor([1.0, 0.5, 0.0, -2.0, 1.0, 0.0], dtype=torch.float64)
    upstream_logp = torch.tensor([0.0, 1.0, 0.3, 0.0, -1.0, 0.0], dtype=torch.float64)
    kl, entropy, teacher_entropy, logp, grad = naive(student, teacher, token, upstream, upstream_logp)
    student, teacher = student.to(dtype), teacher.to(dtype)
    rows = exact_rows(student, teacher, Scratch())
    close = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 3e-5}
    for ours, theirs in (
        (rows.kl_C, kl),
        (rows.student_entropy_C, entropy),
        (rows.teacher_entropy_C, teacher_entropy),
        (student.gather(-1, token[:, None]).squeeze(-1) - rows.student_log_z_C, logp),
    ):
        torch.testing.assert_close(ours.double(), theirs, **close)
    ours = exact_gradient(rows, upstream.to(dtype), upstream_logp.to(dtype), token[:, None])
    torch.testing.assert_close(ours.double(), grad, **close)
    assert not ours[5].any()


def test_only_the_teacher_has_no_probability():
    student, teacher = logits()
    teacher[2, 7] = -INF
    rows = exact_rows(student, teacher, Scratch())
    assert rows.kl_C[2] == INF and rows.kl_C.isinf().sum() == 1
    upstream = torch.ones(6, dtype=torch.float64)
    upstream[2] = 0  # padding: whatever the row holds
    grad = exact_gradient(rows, upstream, None, None)
    assert grad.isfinite().all() and not grad[2].any() and grad[1].any()


@pytest.mark.parametrize("broken", [0, 1])
def test_nan_stays_visible_in_its_row(broken):
    pair = logits()
    pair[broken][1, 4] = math.nan
    rows = exact_rows(*pair, Scratch())
    assert rows.kl_C.isnan().tolist() == [False, True, False, False, False, False]
    grad = exact_gradient(rows, torch.ones(6, dtype=torch.float64), None, None)
    assert grad.isnan().any(-1).tolist() == [False, True, False, False, False, False]


def test_scratch_serves_chunks_of_any_size():
    """The second chunk overwrites the first one's tensors, and a smaller or larger one is right too."""
    scratch = Scratch()
    for count in (4, 2, 6):
        student, teacher = (x[:count] for x in logits(seed=count))
        again, fresh = exact_rows(student, teacher, scratch), exact_rows(student, teacher, Scratch())
        assert all(torch.equal(a, b) for a, b in zip(again, fresh, strict=True))
    before = set(scratch.buffers)
    exact_rows(student, teacher, scratch)
    assert set(scratch.buffers) == before
