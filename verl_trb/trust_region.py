"""The trust region: blend student and teacher as far as a KL budget allows.

    mu* = argmin_mu KL(mu || pi_T)  subject to  KL(mu || pi_S) <= epsilon
        = pi_S^(1-beta) pi_T^beta / Z   with the largest beta in [0, 1] that fits the budget

(arXiv 2605.31159, section 3.) `blend` is the whole interface. Pure tensors: no verl, no vLLM.

Shapes: N rows (prefixes), V vocabulary. `...` is any batch shape, flattened to N.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from verl_trb.bits import LOG2_E, LOG_2
from verl_trb.scratch import Scratch, ThreadScratch, most_rows

# Log-probabilities under this are probability 0: float64 holds hardly less, and float32 would lose the digits
# of beta * ratio.
LOG_ZERO = -700.0
# Passes after which a bracket that shrinks slowly is halved.
PATIENCE = 5
# Stands for infinity in the passes: unlike infinity, it makes no NaN out of 0 * infinity.
HUGE = 1e30
# Sums of weights that lie between have lost nothing to the range of float32.
LEAST_SUM, MOST_SUM = 1e-25, 1e25
# Numbers in one tensor of a block on a CPU: the three that a pass reads stay in a level-3 cache of 16 MB, in float32.
BLOCK_ELEMENTS = 2**20
_SCRATCH = ThreadScratch()


class Blend(NamedTuple):
    """A rollout policy at each prefix, next to what it cost.

    log_mu: [..., V] log-probabilities of the rollout policy; beta: [...] weight of the teacher, NaN for
    policies without one; kl: [...] KL(mu || pi_S) in nats. All float32 (float64 for float64 input).
    """

    log_mu: Tensor
    beta: Tensor
    kl: Tensor


class Solution(NamedTuple):
    """beta_N, KL(mu || pi_S) kl_N, log normalizer log_z_N of pi_S e^(beta ratio), passes_N over V; one_sided: whether a
    token has probability 0 in one model only.
    """

    beta_N: Tensor
    kl_N: Tensor
    log_z_N: Tensor
    passes_N: Tensor
    one_sided: bool


@torch.no_grad()
def blend(
    logp_student: Tensor,
    logp_teacher: Tensor,
    epsilon: float | Tensor,
    *,
    tolerance: float = 1e-3,
    max_passes: int = 64,
) -> Blend:
    """TRB's rollout policy mu* (arXiv 2605.31159, section 3) at every prefix. No gradient flows through it.

    logp_student, logp_teacher: [..., V] normalized log-probabilities of one shape, any floating dtype.
    epsilon: budget in nats, a scalar or a tensor of the batch shape [...].
    tolerance: a budget that binds is used to within this fraction, from below: KL in
      [epsilon (1 - tolerance), epsilon]. float32 cannot resolve KL below about 1e-7 nats, so there the solver
      keeps another 5e-7 to 1.5e-6 of distance, and a budget under 5e-7 gives the student.
    max_passes: sweeps over the vocabulary after which a row settles for the best feasible beta so far.

    Exact cases: log_mu is bitwise logp_student where epsilon = 0, and bitwise logp_teacher where
    KL(pi_T || pi_S) <= epsilon. Where the student gives a token probability 0 (-inf), mu does too: the
    teacher is then cut to the student's support and renormalized, and KL is measured from there. Where only
    the teacher gives 0, every beta > 0 gives 0, which costs at least -log pi_S(teacher's support): if that
    exceeds the budget, mu is the student. A log-probability under -700 counts as -inf (some models mask with
    -1e9). NaN in a row gives NaN in that row.

    Raises ValueError for shapes that differ, an epsilon that is negative or not finite, a tolerance outside
    (0, 1).
    """
    if logp_student.shape != logp_teacher.shape:
        raise ValueError(
            f"student and teacher log-probabilities differ in shape: {tuple(logp_student.shape)} and "
            f"{tuple(logp_teacher.shape)}; cut both to the shared vocabulary first."
        )
    if logp_student.dim() == 0 or logp_student.shape[-1] == 0:
        raise ValueError("log-probabilities need a last dimension with the vocabulary; this one is empty.")
    if not 0.0 < tolerance < 1.0:
        raise ValueError(f"tolerance is {tolerance}, but must lie strictly between 0 and 1.")
    batch, size = logp_student.shape[:-1], logp_student.shape[-1]
    double = torch.float64 in (logp_student.dtype, logp_teacher.dtype)
    dtype = torch.float64 if double else torch.float32
    epsilon_N = _epsilon_rows(epsilon, batch, dtype, logp_student.device)

    student_NV, teacher_NV = logp_student.reshape(-1, size), logp_teacher.reshape(-1, size)
    log_mu_NV = torch.empty(student_NV.shape, dtype=dtype, device=student_NV.device)
    beta_N = torch.zeros_like(epsilon_N)
    kl_N = torch.zeros_like(epsilon_N)
    # On a CPU: as many rows at a time as keep the temporaries in its cache.
    step = max(1, most_rows(BLOCK_ELEMENTS, student_NV, len(student_NV)))
    scratch_3NV = _scratch(log_mu_NV[:step])
    for rows in (slice(start, start + step) for start in range(0, len(student_NV), step)):
        student_MV, teacher_MV = student_NV[rows].to(dtype), teacher_NV[rows].to(dtype)
        beta_N[rows], kl_N[rows] = _blend_rows(
            student_MV, teacher_MV, epsilon_N[rows], tolerance, max_passes, log_mu_NV[rows], scratch_3NV
        )
    return Blend(log_mu_NV.reshape(*batch, size), beta_N.reshape(batch), kl_N.reshape(batch))


def _scratch(like_NV: Tensor) -> Tensor:
    """Three uninitialized tensors like this one."""
    kept = like_NV.numel() <= BLOCK_ELEMENTS  # not for a single row that is longer
    return (_SCRATCH if kept else Scratch()).empty("passes", torch.Size((3, *like_NV.shape)), like_NV)


def _blend_rows(
    student_NV: Tensor,
    teacher_NV: Tensor,
    epsilon_N: Tensor,
    tolerance: float,
    max_passes: int,
    log_mu_NV: Tensor,
    scratch_3NV: Tensor,
) -> tuple[Tensor, Tensor]:
    """`blend` for the rows of one block: beta_N, kl_N; log mu is written to log_mu_NV."""
    budget_N = epsilon_N > 0
    if not bool(budget_N.any()):
        log_mu_NV.copy_(student_NV)
        return torch.zeros_like(epsilon_N), torch.zeros_like(epsilon_N)
    base_NV, ratio_NV, solution = solve_beta(
        student_NV, teacher_NV, epsilon_N, tolerance=tolerance, max_passes=max_passes, scratch_3NV=scratch_3NV
    )
    beta_N, kl_N = solution.beta_N.where(budget_N, 0.0), solution.kl_N.where(budget_N, 0.0)
    torch.addcmul(base_NV, LOG2_E * beta_N[:, None], ratio_NV, out=log_mu_NV)
    torch.add(-solution.log_z_N[:, None], log_mu_NV, alpha=LOG_2, out=log_mu_NV)
    torch.threshold_(log_mu_NV, -HUGE / 2, -math.inf)
    student_rows, teacher_rows = (beta_N == 0).nonzero().squeeze(-1), (beta_N == 1).nonzero().squeeze(-1)
    if len(student_rows) > 0:
        log_mu_NV[student_rows] = student_NV[student_rows]
    if len(teacher_rows) > 0 and solution.one_sided:
        # Where the student's support cuts the teacher's, mu is the teacher renormalized, and stays as computed.
        cut_NV = (student_NV[teacher_rows] < LOG_ZERO) & (teacher_NV[teacher_rows] >= LOG_ZERO)
        teacher_rows = teacher_rows[~cut_NV.any(-1)]
    if len(teacher_rows) > 0:
        log_mu_NV[teacher_rows] = teacher_NV[teacher_rows]
    return beta_N, kl_N


def solve_beta(
    logp_student_NV: Tensor,
    logp_teacher_NV: Tensor,
    epsilon_N: Tensor,
    *,
    tolerance: float = 1e-3,
    max_passes: int = 64,
    scratch_3NV: Tensor | None = None,
) -> tuple[Tensor, Tensor, Solution]:
    """Bracketed Newton for the largest beta with KL <= epsilon > 0, on f(beta) = sqrt(2 KL), nearly linear.

    Returns (base_NV, ratio_NV, solution): log mu = LOG_2 base + beta ratio - log_z on the rows with beta > 0, where
    about -HUGE stands for probability 0. The first pass is at beta = 0: the ratio's moments there give the first
    guess. Every further pass is one Newton step; beta = 1 is looked at where a step leads there. Rows that have
    converged leave the work, at the latest when half have; a few host synchronizations a pass. scratch_3NV: where base,
    ratio and a temporary go (fresh memory costs page faults).
    """
    zero_N, one_N = torch.zeros_like(epsilon_N), torch.ones_like(epsilon_N)
    slack = 4 * torch.finfo(epsilon_N.dtype).eps
    # KL is accepted between lower and upper, a window just below the budget, and aimed at its middle.
    upper_N = epsilon_N * (1 - tolerance / 8) - slack
    lower_N = epsilon_N * (1 - tolerance) - 3 * slack
    aim_N = (upper_N + lower_N.clamp_min(0)).clamp_min_(0).sqrt_()  # f at the middle

    rows_in = len(logp_student_NV)
    if scratch_3NV is None:
        scratch_3NV = logp_student_NV.new_empty(3, *logp_student_NV.shape)
    base_NV, ratio_NV, scratch_NV = scratch_3NV[:, :rows_in]
    one_sided, lost_N = _prepare(logp_student_NV, logp_teacher_NV, base_NV, ratio_NV)
    log_z0_N, centre_N, variance0_N, third0_N = _moments(base_NV, ratio_NV, zero_N, scratch_NV, third=True)
    # Shifting the ratio changes no mu and no KL; centred, beta E[r] and log Z stay small and do not cancel.
    ratio_NV.sub_(centre_N.nan_to_num(0.0)[:, None])
    kl0_N = torch.log1p(lost_N * (-log_z0_N).exp())  # the limit of KL at beta -> 0
    log_total_N = log_z0_N + kl0_N  # 0 up to rounding of the student's normalization
    f0_N = (2 * kl0_N).sqrt()
    slope0_N = torch.where(f0_N > 0, math.inf, variance0_N.rsqrt())

    # A point on the curve is [5, N]: beta, KL, log Z, f, dbeta/df. f = inf at beta = 1 until that has been looked at.
    low_5N = torch.stack([zero_N, zero_N, log_z0_N, f0_N, slope0_N])
    high_5N = torch.stack([one_N, zero_N, zero_N, one_N * math.inf, zero_N])
    # Until a step has led elsewhere, the student (0), which is feasible.
    solution_3N, passes_N = low_5N[:3].clone(), one_N.clone()
    broken_N = (log_z0_N + variance0_N).isnan()
    solution_3N[:2].masked_fill_(broken_N, math.nan)
    # Only beta = 1 can still be feasible where kl0 is in the last thousandth of the budget.
    movable_N = kl0_N <= upper_N
    guess_N = torch.where(movable_N, _first_guess(aim_N, slope0_N, third0_N / variance0_N), one_N)
    at_one = bool((guess_N == 1).any())

    # The M rows at work, and of each its guess, both ends of its bracket, and what KL is compared with.
    rows = ((kl0_N <= epsilon_N) & ~broken_N).nonzero().squeeze(-1)
    bounds_N = torch.stack([aim_N, lower_N, upper_N, epsilon_N, log_total_N])
    state_16M = torch.cat([guess_N[None], low_5N, high_5N, bounds_N])
    base_MV, ratio_MV = base_NV, ratio_NV
    if len(rows) < rows_in:
        state_16M, base_MV, ratio_MV = state_16M[:, rows], base_NV[rows], ratio_NV[rows]
    guess_M, low_5M, high_5M, aim_M, lower_M, upper_M, epsilon_M, log_total_M = _of_state(state_16M)
    active_M, swept = torch.ones_like(rows, dtype=torch.bool), 1
    while len(rows) > 0 and swept < max_passes:
        log_z_M, mean_M, variance_M, _ = _moments(base_MV, ratio_MV, guess_M, scratch_NV)
        swept += 1
        kl_M = torch.addcmul(log_total_M - log_z_M, guess_M, mean_M).clamp_min_(0)
        f_M = (kl_M + kl_M).sqrt_()
        slope_M = f_M / (guess_M * variance_M)
        point_5M = torch.stack([guess_M, kl_M, log_z_M, f_M, slope_M])
        under_M = kl_M <= upper_M
        if at_one:
            under_M |= (guess_M == 1) & (kl_M <= epsilon_M)
        under_M &= active_M
        low_0M, high_0M = low_5M[0], high_5M[0]
        low_5M, high_5M = torch.where(under_M, point_5M, low_5M), torch.where(under_M, high_5M, point_5M)
        done_M = under_M & (kl_M >= lower_M)
        next_M = torch.addcmul(guess_M, aim_M - f_M, slope_M)  # Newton's
        if swept == 2 and at_one:
            done_M |= ~movable_N[rows]
        active_M = active_M & ~done_M
        inside_M = (next_M > low_5M[0]) & (next_M < high_5M[0])
        creeping = swept - 2 >= PATIENCE  # on a curve like a step both ends may: halve the bracket
        if creeping or not bool((inside_M | ~active_M).all()):
            beyond_M, at_one = (next_M >= 1) & high_5M[3].isinf(), True
            if creeping or not bool((inside_M | beyond_M | ~active_M).all()):
                next_M = _inside(next_M, low_5M, high_5M, _interpolate(low_5M, high_5M, aim_M))
            if creeping:
                slow_M = high_5M[0] - low_5M[0] > (high_0M - low_0M) / 2
                next_M = torch.where(slow_M, (low_5M[0] + high_5M[0]) / 2, next_M)
            next_M = torch.where(beyond_M, 1.0, next_M)
            # Also done when no number is left between the ends: the curve is steeper than the dtype resolves.
            active_M &= (next_M > low_5M[0]) & ((next_M < high_5M[0]) | beyond_M)
        keep = active_M.nonzero().squeeze(-1)
        if 2 * len(keep) > len(rows):  # to sweep over the others again takes less than to copy these
            guess_M = torch.where(active_M, next_M, guess_M)
            continue
        solution_3N[:, rows], passes_N[rows] = low_5M[:3], float(swept)
        rows = rows[keep]
        if len(rows) > 0:
            state_16M = torch.cat([next_M[None], low_5M, high_5M, state_16M[11:]]).index_select(1, keep)
            guess_M, low_5M, high_5M, aim_M, lower_M, upper_M, epsilon_M, log_total_M = _of_state(state_16M)
            base_MV, ratio_MV = base_MV.index_select(0, keep), ratio_MV.index_select(0, keep)
            active_M = torch.ones_like(rows, dtype=torch.bool)
    if len(rows) > 0:  # max_passes
        solution_3N[:, rows], passes_N[rows] = low_5M[:3], float(swept)
    beta_N, kl_N, log_z_N = solution_3N
    return base_NV, ratio_NV, Solution(beta_N, kl_N, log_z_N, passes_N, one_sided)


def _of_state(state_16M: Tensor) -> tuple[Tensor, ...]:
    """Guess, low and high end [5, M], and the five numbers KL is compared with."""
    return state_16M[0], state_16M[1:6], state_16M[6:11], *state_16M[11:].unbind()


def _first_guess(aim_N: Tensor, slope0_N: Tensor, skew_N: Tensor) -> Tensor:
    """beta in (0, 1] at which f = (beta + skew beta^2 / 3) / slope0 meets the aim, from the cumulants at beta = 0.

    skew_N: the ratio's third cumulant over its variance. 1 where the student puts no weight on any difference.
    """
    linear_N = aim_N * slope0_N
    # The parabola turns where its tangent has lost its slope: not trusted beyond half of that.
    root_N = (1 + 4 / 3 * skew_N * linear_N).clamp_min(0.25).sqrt()
    return (2 * linear_N / (1 + root_N)).nan_to_num(1.0).clamp(torch.finfo(aim_N.dtype).tiny, 1)


def _prepare(
    logp_student_NV: Tensor, logp_teacher_NV: Tensor, base_NV: Tensor, ratio_NV: Tensor
) -> tuple[bool, Tensor]:
    """Writes base_NV = log2 pi_S and ratio_NV = log pi_T - log pi_S. Returns whether a token has probability 0 in one
    model only, and lost_N, the student's mass the teacher lacks.

    Tokens that either model gives probability 0 get base -HUGE and ratio 0.
    """
    torch.threshold(logp_student_NV, LOG_ZERO, -HUGE, out=base_NV)
    torch.threshold(logp_teacher_NV, LOG_ZERO, -HUGE, out=ratio_NV).sub_(base_NV)
    lost_N = torch.zeros_like(base_NV[:, 0])
    # Tokens with 0 in both have the ratio 0 by now.
    one_sided = bool((ratio_NV.amin() < -HUGE / 2) | (ratio_NV.amax() > HUGE / 2))
    if one_sided:
        dead_NV = ratio_NV.abs() > HUGE / 2
        lost_N = torch.where(dead_NV, base_NV, -math.inf).exp().sum(-1)
        base_NV.masked_fill_(dead_NV, -HUGE)
        ratio_NV.masked_fill_(dead_NV, 0)
    base_NV.mul_(LOG2_E)
    return one_sided, lost_N


def _moments(
    base_NV: Tensor, ratio_NV: Tensor, beta_N: Tensor, scratch_NV: Tensor, third: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log sum_a w, and mean, variance and (if asked for, else 0) third cumulant of the ratio under w, for
    w = 2^base e^(beta ratio): one pass.
    """
    bits_N1, w_NV = beta_N.mul(LOG2_E)[:, None], scratch_NV[: len(beta_N)]
    total_N = torch.addcmul(base_NV, bits_N1, ratio_NV, out=w_NV).exp2_().sum(-1)
    top_N = torch.zeros_like(beta_N)
    least, most = torch.aminmax(total_N)
    if not (float(least) > LEAST_SUM and float(most) < MOST_SUM):  # models far apart; or NaN
        torch.addcmul(base_NV, bits_N1, ratio_NV, out=w_NV)
        top_N = w_NV.amax(-1)
        total_N = w_NV.sub_(top_N[:, None]).exp2_().sum(-1)
    mean_N = w_NV.mul_(ratio_NV).sum(-1) / total_N
    square_N = w_NV.mul_(ratio_NV).sum(-1) / total_N
    third_N = torch.zeros_like(mean_N)
    if third:
        third_N = w_NV.mul_(ratio_NV).sum(-1) / total_N - 3 * mean_N * square_N + 2 * mean_N**3
    variance_N = torch.addcmul(square_N, mean_N, mean_N, value=-1).clamp_min_(0)
    return torch.add(total_N.log(), top_N, alpha=LOG_2), mean_N, variance_N, third_N


def _interpolate(low_5N: Tensor, high_5N: Tensor, aim_N: Tensor) -> Tensor:
    """beta at f = aim by the monotone rational quadratic with the value and slope of both ends; NaN without both."""
    (beta0_N, _, _, f0_N, slope0_N), (beta1_N, _, _, f1_N, slope1_N) = low_5N, high_5N
    rise_N, run_N = beta1_N - beta0_N, f1_N - f0_N
    t_N = (aim_N - f0_N) / run_N
    a_N, b_N = slope0_N * run_N / rise_N, slope1_N * run_N / rise_N
    return beta0_N + rise_N * (t_N**2 + a_N * t_N * (1 - t_N)) / (1 + (a_N + b_N - 2) * t_N * (1 - t_N))


def _inside(guess_N: Tensor, low_5N: Tensor, high_5N: Tensor, second_N: Tensor | None = None) -> Tensor:
    """The guess if it lies strictly inside the bracket, else the second guess, else the middle."""
    low_N, high_N = low_5N[0], high_5N[0]
    other_N = (low_N + high_N) / 2 if second_N is None else _inside(second_N, low_5N, high_5N)
    return torch.where((guess_N > low_N) & (guess_N < high_N), guess_N, other_N)


def _epsilon_rows(epsilon: float | Tensor, batch: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """epsilon as one number a row, checked."""
    if not isinstance(epsilon, Tensor):
        if not 0 <= epsilon < math.inf:
            raise ValueError(f"epsilon must be finite and at least 0 nats, but is {epsilon}.")
        return torch.full((batch.numel(),), epsilon, dtype=dtype, device=device)
    budget = epsilon.to(device, dtype)
    if budget.dim() > 0 and budget.shape != batch:
        raise ValueError(f"epsilon has shape {tuple(budget.shape)}, but must be a scalar or {tuple(batch)}.")
    good = (budget >= 0) & (budget < math.inf)
    if not bool(good.all()):
        bad = float(budget[~good].flatten()[0])
        raise ValueError(f"epsilon must be finite and at least 0 nats, but is {bad}.")
    return budget.expand(batch).reshape(-1)
