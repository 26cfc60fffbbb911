"""The exact reverse KL of rows of logits: what chunked_loss.py takes for divergences.reverse_kl, in few sweeps.

    KL(pi_S || pi_T) = sum_a p_a (x_a - y_a) - log Z_S + log Z_T,   its gradient for x: p_a (x_a - y_a - mean_p(x - y))

x, y: logits of student and teacher, not normalized. softmax exponentiates and divides in one sweep, and log Z follows
from x and softmax(x) at the likeliest token; no row is ever exponentiated by exp or differentiated through a logarithm.

Shapes: C tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from verl_trb.scratch import Scratch


class ExactRows(NamedTuple):
    """Per token, [C]: KL(pi_S || pi_T) and both entropies in nats, and both log Z; then what the gradient needs."""

    kl_C: Tensor
    student_entropy_C: Tensor
    teacher_entropy_C: Tensor
    student_log_z_C: Tensor
    teacher_log_z_C: Tensor
    p_CV: Tensor  # the student's probabilities, but for a rounding: p / total is normalized
    total_C: Tensor
    gap_CV: Tensor
    mean_gap_C: Tensor


def exact_rows(student_CV: Tensor, teacher_CV: Tensor, scratch: Scratch) -> ExactRows:
    """The reverse KL of every row of logits; float32 or float64, not overwritten. The result lives in `scratch`.

    -inf in both (masked tokens), or in the student, contributes nothing; where only the teacher has -inf, KL is inf.
    NaN in a row gives NaN in that row.
    """
    q_CV, p_CV, product_CV = (scratch.empty(name, student_CV.shape, student_CV) for name in ("q", "p", "product"))
    q_total_C, teacher_log_z_C = _softmax(teacher_CV, out=q_CV)
    teacher_entropy_C = teacher_log_z_C - _sum_product(q_CV, teacher_CV, out=q_CV) / q_total_C
    gap_CV = torch.sub(student_CV, teacher_CV, out=q_CV).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=0.0)
    total_C, student_log_z_C = _softmax(student_CV, out=p_CV)
    student_entropy_C = student_log_z_C - _sum_product(p_CV, student_CV, out=product_CV) / total_C
    kl_C = torch.mul(p_CV, gap_CV, out=product_CV).sum(-1) / total_C - student_log_z_C + teacher_log_z_C
    return ExactRows(
        kl_C=kl_C,
        student_entropy_C=student_entropy_C,
        teacher_entropy_C=teacher_entropy_C,
        student_log_z_C=student_log_z_C,
        teacher_log_z_C=teacher_log_z_C,
        p_CV=p_CV,
        total_C=total_C,
        gap_CV=gap_CV,
        mean_gap_C=kl_C + student_log_z_C - teacher_log_z_C,  # from KL, so that the teacher's NaN shows
    )


def exact_gradient(
    rows: ExactRows, upstream_C: Tensor, upstream_logp_C: Tensor | None, token_C1: Tensor | None
) -> Tensor:
    """upstream * d KL / d logits + upstream_logp * d log pi_S(token) / d logits, [C, V].

    It overwrites the rows' tensors. A token whose upstreams are 0 (padding) gets 0, whatever its row holds.
    """
    idle_C = upstream_C == 0
    shift_C = (rows.mean_gap_C * upstream_C).masked_fill(idle_C, 0)
    gap_CV = _blank(rows.gap_CV, idle_C)
    if upstream_logp_C is not None:
        shift_C = shift_C + upstream_logp_C
        idle_C = idle_C & (upstream_logp_C == 0)
    scale_C1, shift_C1 = ((x_C / rows.total_C)[:, None] for x_C in (upstream_C, shift_C))
    grad_CV = _blank(gap_CV.mul_(scale_C1).sub_(shift_C1).mul_(rows.p_CV), idle_C)
    if upstream_logp_C is not None and token_C1 is not None:
        grad_CV.scatter_add_(-1, token_C1, upstream_logp_C[:, None].to(grad_CV.dtype))
    return grad_CV


def _softmax(logits_CV: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Writes the probabilities as torch gives them; their sum [C] (softmax rounds more than sum), log sum e^logits."""
    p_CV = torch.softmax(logits_CV, -1, out=out)
    total_C = p_CV.sum(-1)
    return total_C, logits_CV.amax(-1) + (total_C / p_CV.amax(-1)).log()


def _sum_product(p_CV: Tensor, x_CV: Tensor, out: Tensor) -> Tensor:
    """sum_a p_a x_a, where 0 * -inf is 0; out is overwritten."""
    return torch.mul(p_CV, x_CV, out=out).nan_to_num_(nan=0.0).sum(-1)


def _blank(x_CV: Tensor, idle_C: Tensor) -> Tensor:
    """x with 0 in the idle rows, in place; usually there are none, and on a CPU it pays to look."""
    if x_CV.device.type != "cpu" or bool(idle_C.any()):
        x_CV.masked_fill_(idle_C[:, None], 0)
    return x_CV
