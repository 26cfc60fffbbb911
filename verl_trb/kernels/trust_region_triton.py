"""The solver of trust_region.py as one Triton kernel, from the teacher's raw logits to log mu.

One program a row. Its sweeps over the vocabulary are: one for the teacher's normalizer, one for both ends of the
curve (beta = 0 and 1), one for each Newton step (sum and derivatives together), one that writes log mu. Every sweep
reads both models once, in their own dtype; temperature, the mask and the merge of the two EOS
(`vocabulary.canonicalize`) happen in the read, so no canonicalized or normalized copy of the teacher exists.

The steps are those of `trust_region.solve_beta`, which explains them; tests/kernel_checks.py holds both to each
other and to bisection, in Triton's interpreter on a CPU (TRITON_INTERPRET=1) or on a GPU.

Shapes: N rows (prefixes), V vocabulary.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from verl_trb import trust_region
from verl_trb.trust_region import Blend
from verl_trb.vocabulary import SharedVocabulary

LOG_ZERO = tl.constexpr(trust_region.LOG_ZERO)
HUGE = tl.constexpr(trust_region.HUGE)
PATIENCE = tl.constexpr(trust_region.PATIENCE)
INF = tl.constexpr(math.inf)
NAN = tl.constexpr(math.nan)
# Rounding that is kept away from the budget: 4 units of float32.
SLACK = tl.constexpr(4 * 2.0**-23)


@torch.no_grad()
def blend_logits(
    logp_student_NV: Tensor,
    teacher_logits_NV: Tensor,
    epsilon_N: Tensor,
    *,
    vocabulary: SharedVocabulary | None = None,
    temperature_N: Tensor | None = None,
    tolerance: float = 1e-3,
    max_passes: int = 64,
    block: int | None = None,
) -> tuple[Blend, Tensor]:
    """`trust_region.blend` of the student and the canonicalized, normalized teacher; and the passes, int32 [N].

    logp_student_NV: normalized log-probabilities [N, V], any floating dtype up to float32.
    teacher_logits_NV: [N, at least V] as the output layer gives them: not normalized, with padding, mask and both
      EOS. Without a vocabulary [N, V].
    epsilon_N: [N], finite and at least 0, in nats (not checked here: that would wait for the GPU).
    temperature_N: positive, [N]; divides the teacher's logits. None is 1.
    block: tokens read at a time, a power of 2, for tests.

    log_mu is float32, bitwise logp_student where epsilon = 0, the teacher's log-probabilities where KL(pi_T || pi_S)
    <= epsilon. Raises ValueError for shapes that do not fit together.
    """
    rows, size = logp_student_NV.shape
    if teacher_logits_NV.shape[0] != rows or teacher_logits_NV.shape[1] < size:
        raise ValueError(
            f"the teacher's logits are {list(teacher_logits_NV.shape)}, but must be [{rows}, at least {size}]."
        )
    if vocabulary is not None and vocabulary.size != size:
        raise ValueError(f"the student has {size} log-probabilities, but the shared vocabulary {vocabulary.size} ids.")
    device = logp_student_NV.device
    log_mu_NV = torch.empty(rows, size, dtype=torch.float32, device=device)
    beta_N, kl_N = log_mu_NV.new_empty(2, rows)
    passes_N = torch.empty(rows, dtype=torch.int32, device=device)
    if temperature_N is None:
        temperature_N = torch.ones_like(beta_N)
    merge = vocabulary is not None and vocabulary.teacher_eos != vocabulary.student_eos
    if rows > 0:
        student_NV, teacher_NV = (
            x if x.stride(1) == 1 else x.contiguous() for x in (logp_student_NV, teacher_logits_NV)
        )
        _blend_kernel[(rows,)](
            student_NV,
            teacher_NV,
            log_mu_NV,
            beta_N,
            kl_N,
            passes_N,
            epsilon_N.float().contiguous(),
            temperature_N.float().contiguous(),
            passes_N if vocabulary is None else _mask(vocabulary, device),
            student_NV.stride(0),
            teacher_NV.stride(0),
            size,
            vocabulary.student_eos if vocabulary is not None else 0,
            vocabulary.teacher_eos if vocabulary is not None else 0,
            float(tolerance),
            max_passes,
            MASK=vocabulary is not None,
            MERGE=merge,
            BLOCK=block or min(4096, triton.next_power_of_2(size)),
            num_warps=8,
        )
    return Blend(log_mu_NV, beta_N, kl_N), passes_N


@functools.lru_cache(maxsize=16)
def _mask(vocabulary: SharedVocabulary, device: torch.device) -> Tensor:
    """uint8 [V], 1 at ids that have probability 0 in both models."""
    mask_V = torch.zeros(vocabulary.size, dtype=torch.uint8)
    mask_V[list(vocabulary.masked)] = 1
    return mask_V.to(device)


@triton.jit
def _read_teacher(teacher, masked, at, size, temperature, eos, eos_logit, MASK: tl.constexpr, MERGE: tl.constexpr):
    """The teacher's canonicalized logits at some ids; -inf beyond the vocabulary."""
    logit = tl.load(teacher + at, mask=at < size, other=-INF).to(tl.float32) / temperature
    if MASK:
        logit = tl.where(tl.load(masked + at, mask=at < size, other=1) != 0, -INF, logit)
    if MERGE:
        logit = tl.where(at == eos, eos_logit, logit)
    return logit


@triton.jit
def _base_and_ratio(logp_student, logp_teacher):
    """As trust_region._prepare: tokens that either model gives probability 0 get base -HUGE and ratio 0."""
    dead = (logp_student < LOG_ZERO) | (logp_teacher < LOG_ZERO)
    return tl.where(dead, -HUGE, logp_student), tl.where(dead, 0.0, logp_teacher - logp_student)


@triton.jit
def _log_add(a, b):
    top = tl.maximum(a, b)
    return tl.where(top == -INF, top, top + tl.log(tl.exp(a - top) + tl.exp(b - top)))


@triton.jit
def _add_moments(top, z, first, second, base, ratio, beta):
    """Adds one block of w = e^(base + beta ratio) to the sums of w, w ratio and w ratio^2, all scaled by e^-top."""
    log_w = base + beta * ratio
    new_top = tl.maximum(top, tl.max(log_w, 0))
    scale = tl.exp(top - new_top)
    w = tl.exp(log_w - new_top)
    return new_top, z * scale + w, first * scale + w * ratio, second * scale + w * ratio * ratio


@triton.jit
def _finish(top, z, first, second):
    """log sum w, mean and variance of the ratio."""
    total = tl.sum(z, 0)
    mean = tl.sum(first, 0) / total
    return top + tl.log(total), mean, tl.maximum(tl.sum(second, 0) / total - mean * mean, 0.0)


@triton.jit
def _interpolate(beta0, f0, slope0, beta1, f1, slope1, aim):
    rise = beta1 - beta0
    run = f1 - f0
    t = (aim - f0) / run
    a = slope0 * run / rise
    b = slope1 * run / rise
    return beta0 + rise * (t * t + a * t * (1 - t)) / (1 + (a + b - 2) * t * (1 - t))


@triton.jit
def _inside(guess, other, low, high):
    """The guess if it lies strictly inside the bracket, else the other, else the middle."""
    other = tl.where((other > low) & (other < high), other, (low + high) / 2)
    return tl.where((guess > low) & (guess < high), guess, other)


@triton.jit
def _blend_kernel(
    student,
    teacher,
    log_mu,
    beta_out,
    kl_out,
    passes_out,
    epsilons,
    temperatures,
    masked,
    student_stride,
    teacher_stride,
    size,
    student_eos,
    teacher_eos,
    tolerance,
    max_passes,
    MASK: tl.constexpr,
    MERGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    log_mu += row * size
    lane = tl.arange(0, BLOCK)
    none = tl.zeros([BLOCK], tl.float32)
    epsilon = tl.load(epsilons + row)
    temperature = tl.load(temperatures + row)
    zero = epsilon * 0.0
    one = zero + 1.0
    beta = zero
    kl = zero
    log_z = zero
    centre = zero
    log_z_teacher = zero
    cut = zero
    passes = 0
    eos_logit = zero
    if MERGE:
        own = tl.load(teacher + student_eos).to(tl.float32) / temperature
        eos_logit = _log_add(own, tl.load(teacher + teacher_eos).to(tl.float32) / temperature)

    if epsilon > 0:
        # The teacher's normalizer.
        top = zero - HUGE * 1e5
        z = none
        for start in range(0, size, BLOCK):
            logit = _read_teacher(teacher, masked, start + lane, size, temperature, student_eos, eos_logit, MASK, MERGE)
            new_top = tl.maximum(top, tl.max(logit, 0))
            z = z * tl.exp(top - new_top) + tl.exp(logit - new_top)
            top = new_top
        log_z_teacher = top + tl.log(tl.sum(z, 0))

        # Both ends of the curve, and the student's mass where the teacher has none.
        lost = none
        cuts = none
        top_lost = zero - HUGE * 1e5
        top0, z0s, first0, second0 = top_lost, none, none, none
        top1, z1s, first1, second1 = top_lost, none, none, none
        for start in range(0, size, BLOCK):
            at = start + lane
            logp_student = tl.load(student + at, mask=at < size, other=-INF).to(tl.float32)
            logit = _read_teacher(teacher, masked, at, size, temperature, student_eos, eos_logit, MASK, MERGE)
            logp_teacher = logit - log_z_teacher
            base, ratio = _base_and_ratio(logp_student, logp_teacher)
            top0, z0s, first0, second0 = _add_moments(top0, z0s, first0, second0, base, ratio, 0.0)
            top1, z1s, first1, second1 = _add_moments(top1, z1s, first1, second1, base, ratio, 1.0)
            lost += tl.where((logp_student >= LOG_ZERO) & (logp_teacher < LOG_ZERO), tl.exp(logp_student), 0.0)
            cuts += tl.where((logp_student < LOG_ZERO) & (logp_teacher >= LOG_ZERO), 1.0, 0.0)
        passes = 1
        cut = tl.sum(cuts, 0)
        log_z0, centre, variance0 = _finish(top0, z0s, first0, second0)
        log_z1, mean1, variance1 = _finish(top1, z1s, first1, second1)
        kl0 = tl.log(1.0 + tl.sum(lost, 0) * tl.exp(-log_z0))  # the limit of KL at beta -> 0
        log_total = log_z0 + kl0
        kl1 = mean1 - log_z1 + log_total
        kl1 = tl.where(kl1 < 0, 0.0, kl1)  # keeps NaN
        log_z = log_z1 - centre  # from here the ratio is centred

        upper = epsilon * (1 - tolerance / 8) - SLACK
        lower = epsilon * (1 - tolerance) - 3 * SLACK
        aim = tl.sqrt(tl.maximum(upper + tl.maximum(lower, 0.0), 0.0))
        teacher_fits = kl1 <= epsilon
        beta = tl.where(teacher_fits, one, tl.where(kl1 > epsilon, zero, kl1 * NAN))
        kl = tl.where(kl1 > epsilon, zero, kl1)

        if (kl1 > epsilon) & (kl0 <= upper):
            low_beta, low_f, low_slope = zero, tl.sqrt(2 * kl0), 1.0 / tl.sqrt(variance0)
            low_slope = tl.where(low_f > 0, INF, low_slope)
            high_beta, high_f = one, tl.sqrt(2 * kl1)
            high_slope = high_f / variance1
            guess = _interpolate(low_beta, low_f, low_slope, high_beta, high_f, high_slope, aim)
            guess = _inside(guess, guess, low_beta, high_beta)
            going = passes < max_passes
            while going:
                top, z, first, second = zero - HUGE * 1e5, none, none, none
                for start in range(0, size, BLOCK):
                    at = start + lane
                    logp_student = tl.load(student + at, mask=at < size, other=-INF).to(tl.float32)
                    logit = _read_teacher(teacher, masked, at, size, temperature, student_eos, eos_logit, MASK, MERGE)
                    base, ratio = _base_and_ratio(logp_student, logit - log_z_teacher)
                    ratio = tl.where(base > -HUGE, ratio - centre, 0.0)
                    top, z, first, second = _add_moments(top, z, first, second, base, ratio, guess)
                log_z_guess, mean, variance = _finish(top, z, first, second)
                passes += 1
                width = high_beta - low_beta
                kl_guess = tl.maximum(guess * mean - log_z_guess + log_total, 0.0)
                f = tl.sqrt(2 * kl_guess)
                slope = f / (guess * variance)
                under = kl_guess <= upper
                low_beta = tl.where(under, guess, low_beta)
                low_f = tl.where(under, f, low_f)
                low_slope = tl.where(under, slope, low_slope)
                kl = tl.where(under, kl_guess, kl)
                log_z = tl.where(under, log_z_guess, log_z)
                high_beta = tl.where(under, high_beta, guess)
                high_f = tl.where(under, high_f, f)
                high_slope = tl.where(under, high_slope, slope)
                other = _interpolate(low_beta, low_f, low_slope, high_beta, high_f, high_slope, aim)
                guess = _inside(guess + (aim - f) * slope, other, low_beta, high_beta)
                slow = (passes - 2 >= PATIENCE) & (high_beta - low_beta > width / 2)
                guess = tl.where(slow, (low_beta + high_beta) / 2, guess)
                done = under & (kl_guess >= lower)
                going = (passes < max_passes) & (guess > low_beta) & (guess < high_beta) & (done == 0)
            beta = low_beta

    for start in range(0, size, BLOCK):
        at = start + lane
        logp_student = tl.load(student + at, mask=at < size, other=-INF).to(tl.float32)
        result = logp_student
        if beta != 0:  # also where it is NaN
            logit = _read_teacher(teacher, masked, at, size, temperature, student_eos, eos_logit, MASK, MERGE)
            logp_teacher = logit - log_z_teacher
            result = logp_teacher
            if (beta != 1) | (cut > 0):  # the student's support cuts the teacher's: renormalized
                base, ratio = _base_and_ratio(logp_student, logp_teacher)
                result = tl.where(base > -HUGE, base + beta * (ratio - centre) - log_z, -INF)
        tl.store(log_mu + at, result, mask=at < size)
    tl.store(beta_out + row, beta)
    tl.store(kl_out + row, kl)
    tl.store(passes_out + row, passes)
