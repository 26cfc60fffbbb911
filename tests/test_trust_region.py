"""The solver against plain bisection in float64."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import oracles
import pytest
import torch

from verl_trb import trust_region
from verl_trb.trust_region import Blend, blend, solve_beta

INF = math.inf


def pair(rows, size, *, gap, sharpness=2.0, seed=0, dtype=torch.float32):
    """Log-probabilities of student and teacher, whose logits differ by noise of size `gap`."""
    g = torch.Generator().manual_seed(seed)
    student = sharpness * torch.randn(rows, size, generator=g, dtype=torch.float64)
    teacher = student + gap * torch.randn(rows, size, generator=g, dtype=torch.float64)
    return student.log_softmax(-1).to(dtype), teacher.log_softmax(-1).to(dtype)


def true_kl(log_mu, logp_student):
    return oracles.kl_fast(oracles.probabilities(log_mu), oracles.probabilities(logp_student))


def check_row(log_mu, beta, kl, logp_student, logp_teacher, epsilon, slack):
    """One row of a solution against the oracle. slack: what float32 may cost in nats."""
    p_student, p_teacher = oracles.probabilities(logp_student), oracles.probabilities(logp_teacher)
    best = oracles.bisect_beta(p_student, p_teacher, epsilon)
    spent = true_kl(log_mu, logp_student)
    assert spent <= epsilon + slack / 10, "outside the trust region"
    assert float(kl) == pytest.approx(spent, rel=1e-4, abs=slack)
    if 0 < beta < 1:  # otherwise it is as normalized as the input
        assert float(log_mu.double().logsumexp(-1)) == pytest.approx(0, abs=1e-5 if slack else 1e-12)
    if abs(spent - epsilon) > slack:  # at the boundary either side is right in float32
        assert float(beta) == 1 or best < 1
    if best < 1:
        optimum = oracles.kl_fast(oracles.geometric(p_student, p_teacher, best), p_student)
        assert spent >= optimum - 1.001e-3 * epsilon - slack, "budget not used"
    expected = oracles.geometric(p_student, p_teacher, float(beta))
    np.testing.assert_allclose(oracles.probabilities(log_mu), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 17, 500])
@pytest.mark.parametrize("gap", [0.05, 1.0, 6.0])
def test_follows_bisection(dtype, size, gap):
    logp_student, logp_teacher = pair(8, size, gap=gap, seed=size, dtype=dtype)
    slack = 0.0 if dtype == torch.float64 else 3e-6
    for epsilon in (1e-4, 1e-3, 0.02, 0.3, 10.0):
        log_mu, beta, kl = blend(logp_student, logp_teacher, epsilon)
        assert log_mu.dtype == beta.dtype == kl.dtype == (dtype if slack == 0 else torch.float32)
        for i in range(8):
            check_row(log_mu[i], beta[i], kl[i], logp_student[i], logp_teacher[i], epsilon, slack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_follows_bisection_with_missing_tokens(dtype):
    """Random -inf in both, only the teacher, only the student; every row has its own epsilon."""
    g = torch.Generator().manual_seed(1)
    logp_student, logp_teacher = pair(200, 12, gap=2.0, dtype=dtype)
    kind = torch.randint(0, 8, (200, 12), generator=g)
    logp_student = logp_student.masked_fill((kind == 0) | (kind == 1), -INF).log_softmax(-1)
    logp_teacher = logp_teacher.masked_fill((kind == 0) | (kind == 2), -INF).log_softmax(-1)
    epsilon = 10 ** torch.empty(200, dtype=dtype).uniform_(-4, 1, generator=g)
    log_mu, beta, kl = blend(logp_student, logp_teacher, epsilon)
    assert not (log_mu.isnan().any() or beta.isnan().any() or kl.isnan().any())
    # All three outcomes must occur, or the test shows nothing.
    assert all(share > 0.1 for share in ((beta == 0).double().mean(), (beta == 1).double().mean()))
    assert ((beta > 0) & (beta < 1)).double().mean() > 0.1
    slack = 0.0 if dtype == torch.float64 else 3e-6
    for i in range(200):
        check_row(log_mu[i], beta[i], kl[i], logp_student[i], logp_teacher[i], float(epsilon[i]), slack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_zero_epsilon_is_bitwise_the_student(dtype):
    logp_student, logp_teacher = pair(5, 1000, gap=2.0, dtype=dtype)
    logp_student[0, :10] = -INF
    log_mu, beta, kl = blend(logp_student, logp_teacher, 0.0)
    assert torch.equal(log_mu, logp_student.to(log_mu.dtype))
    assert not beta.any() and not kl.any()
    assert log_mu.data_ptr() != logp_student.data_ptr()
    mixed = blend(logp_student, logp_teacher, torch.tensor([0.1, 0.0, 0.1, 0.0, 0.1]))
    assert torch.equal(mixed.log_mu[[1, 3]], log_mu[[1, 3]])
    assert (mixed.beta > 0).tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_feasible_teacher_is_bitwise_the_teacher(dtype):
    logp_student, logp_teacher = pair(5, 1000, gap=0.3, dtype=dtype)
    log_mu, beta, kl = blend(logp_student, logp_teacher, 1.0)
    assert torch.equal(log_mu, logp_teacher.to(log_mu.dtype))
    assert (beta == 1).all() and (kl > 0.01).all()


def test_identical_models():
    logp, _ = pair(4, 1000, gap=0.0)
    logp[:, 7] = -INF
    log_mu, _, kl = blend(logp, logp.clone(), 1e-3)
    assert torch.equal(log_mu, logp) and not kl.any()


def test_teacher_without_part_of_the_students_support():
    """KL jumps to -log pi_S(teacher's support) at beta = 0+: 0.25 of the student's mass is gone there."""
    logp_student = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()
    logp_teacher = torch.tensor([0.1, 0.9, 0.0], dtype=torch.float64).log()
    jump = -math.log(0.75)
    below = blend(logp_student, logp_teacher, jump - 1e-3)
    assert torch.equal(below.log_mu, logp_student) and below.beta == 0 and below.kl == 0
    budget = torch.full((1,), jump - 1e-3, dtype=torch.float64)
    assert solve_beta(logp_student[None], logp_teacher[None], budget)[2].passes_N == 1  # known at once
    above = blend(logp_student, logp_teacher, jump + 1e-2)
    assert 0 < above.beta < 1 and above.log_mu[2] == -INF and jump < above.kl <= jump + 1e-2
    # The teacher is the student cut to a smaller support: beta does nothing, and the jump is all there is.
    cut = torch.tensor([2 / 3, 1 / 3, 0.0], dtype=torch.float64).log()
    assert blend(logp_student, cut, jump - 1e-3).beta == 0
    assert blend(logp_student, cut, jump + 1e-3).beta == 1


def test_student_without_part_of_the_teachers_support():
    """Tokens with pi_S = 0 stay at 0: at beta = 1 mu is the teacher cut to the student's support."""
    logp_student = torch.tensor([0.5, 0.5, 0.0]).log()
    logp_teacher = torch.tensor([0.3, 0.2, 0.5]).log()
    result = blend(logp_student, logp_teacher, 1.0)
    assert result.beta == 1
    torch.testing.assert_close(result.log_mu.exp(), torch.tensor([0.6, 0.4, 0.0]))
    assert float(result.kl) == pytest.approx(0.6 * math.log(1.2) + 0.4 * math.log(0.8), rel=1e-5)


def test_disjoint_supports_give_the_student():
    logp_student, logp_teacher = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log()
    result = blend(logp_student, logp_teacher, 1e9)
    assert torch.equal(result.log_mu, logp_student) and result.beta == 0 and result.kl == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("low", [-50.0, -300.0, -600.0, -1e4, -1e9, float(torch.finfo(torch.float32).min)])
def test_masks_made_of_large_negative_numbers(dtype, low):
    """One-sided masks that are finite: huge ratios, no NaN, never outside the region, the budget used; from
    some size on they are probability 0."""
    logp_student, logp_teacher = pair(6, 50, gap=1.0, dtype=dtype)
    logp_student[:3, :5] = low
    logp_teacher[3:, 10:15] = low
    logp_student, logp_teacher = logp_student.log_softmax(-1), logp_teacher.log_softmax(-1)
    for epsilon in (1e-3, 0.05, 2.0):
        log_mu, beta, kl = blend(logp_student, logp_teacher, epsilon)
        assert not (log_mu.isnan().any() or beta.isnan().any())
        if low < -1e3:
            exact = [x.masked_fill(x < -1e3, -INF) for x in (logp_student, logp_teacher)]
            torch.testing.assert_close(beta, blend(*exact, epsilon).beta)
        for i in range(6):
            spent = true_kl(log_mu[i], logp_student[i])
            assert spent <= epsilon + 1e-6
            assert float(kl[i]) == pytest.approx(spent, rel=1e-3, abs=3e-6)
            # float32 cannot always resolve the steep start of the curve; float64 can.
            if dtype == torch.float64 and low > -1e3 and beta[i] < 1:
                assert spent >= epsilon * (1 - 1.001e-3)


def test_small_budget_formula():
    """beta ~ sqrt(2 epsilon / Var_S[r]) for small epsilon (arXiv 2605.31159)."""
    logp_student, logp_teacher = pair(6, 300, gap=1.0, dtype=torch.float64)
    p, r = logp_student.exp(), logp_teacher - logp_student
    variance = (p * r**2).sum(-1) - (p * r).sum(-1) ** 2
    result = blend(logp_student, logp_teacher, 1e-8, tolerance=1e-6)
    torch.testing.assert_close(result.beta, (2e-8 / variance).sqrt(), rtol=1e-3, atol=0)


def test_small_budgets_in_float32():
    """Where KL is near the resolution of float32: inside the region, and most of the budget used."""
    logp_student, logp_teacher = pair(4, 151_936, gap=1.0)
    logp_student[:2, :3] += torch.tensor([12.0, 13.0, 14.0])  # two rows with a few likely tokens
    logp_student = logp_student.log_softmax(-1)
    for epsilon in (1e-5, 1e-4):
        log_mu = blend(logp_student, logp_teacher, epsilon).log_mu
        for i in range(4):
            assert epsilon - 3e-6 < true_kl(log_mu[i], logp_student[i]) <= epsilon


def test_teacher_far_below_the_student():
    """log pi_T - log pi_S is near -500 but for one token: no digits may be lost to the common part."""
    logp_student, logp_teacher = pair(8, 40, gap=0.05)
    logp_student[:, 0], logp_teacher[:, 0] = -600.0, 500.0
    logp_student, logp_teacher = logp_student.log_softmax(-1), logp_teacher.log_softmax(-1)
    epsilon = 1e-4
    log_mu, beta, _ = blend(logp_student, logp_teacher, epsilon)
    for i in range(8):
        spent = true_kl(log_mu[i], logp_student[i])
        assert epsilon - 3e-6 < spent <= epsilon
        best = oracles.bisect_beta(*map(oracles.probabilities, (logp_student[i], logp_teacher[i])), epsilon)
        assert float(beta[i]) == pytest.approx(best, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sure_models_that_disagree(dtype):
    """Each all but certain of its own token: KL is like a step in beta, on which Newton's steps alone creep."""
    student, teacher, epsilons = [], [], (0.003, 0.02, 0.3, 1.0, 5.0)
    for gap in (8.0, 12.0, 17.0, 25.0, 40.0):
        student.append([gap, 0.0, 0.0])
        teacher.append([0.0, gap, gap / 2])
    logp_student, logp_teacher = (torch.tensor(x, dtype=dtype).log_softmax(-1) for x in (student, teacher))
    for epsilon in epsilons:
        log_mu, beta, kl = blend(logp_student, logp_teacher, epsilon)
        for i in range(len(student)):
            slack = 0.0 if dtype == torch.float64 else 3e-6
            check_row(log_mu[i], beta[i], kl[i], logp_student[i], logp_teacher[i], epsilon, slack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_teacher_that_is_sure_where_the_student_is_not(dtype):
    """KL(pi_S || pi_T) is far beyond float32's range of exponentials, KL(pi_T || pi_S) is log 2."""
    teacher = [[gap, 0.0] for gap in (80.0, 150.0, 300.0, 600.0)]
    logp_teacher = torch.tensor(teacher, dtype=dtype).log_softmax(-1)
    logp_student = torch.zeros_like(logp_teacher).log_softmax(-1)
    assert torch.equal(blend(logp_student, logp_teacher, 0.7).log_mu, logp_teacher)
    for epsilon in (0.01, 0.3, 0.69):
        log_mu, beta, kl = blend(logp_student, logp_teacher, epsilon)
        for i in range(len(teacher)):
            slack = 0.0 if dtype == torch.float64 else 3e-6
            check_row(log_mu[i], beta[i], kl[i], logp_student[i], logp_teacher[i], epsilon, slack)


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-5, 1e-8])
def test_tolerance(tolerance):
    logp_student, logp_teacher = pair(20, 200, gap=2.0, dtype=torch.float64)
    kl = blend(logp_student, logp_teacher, 0.02, tolerance=tolerance).kl
    assert (kl <= 0.02).all() and (kl >= 0.02 * (1 - tolerance)).all()


@pytest.mark.parametrize("max_passes", [1, 2, 3])
def test_out_of_passes_stays_feasible(max_passes):
    logp_student, logp_teacher = pair(20, 200, gap=5.0, dtype=torch.float64)
    result = blend(logp_student, logp_teacher, 0.1, tolerance=1e-8, max_passes=max_passes)
    for i in range(20):
        spent = true_kl(result.log_mu[i], logp_student[i])
        assert spent <= 0.1 and float(result.kl[i]) == pytest.approx(spent, abs=1e-12)


def test_at_most_three_passes_at_the_size_of_qwen3():
    """Mean passes over the vocabulary, all rows and budgets, V = 151,936; a pass too many would show."""
    size, passes = 151_936, []
    g = torch.Generator().manual_seed(0)
    for head, sharpness, gap in (
        (0.0, 1.0, 1.0),
        (10.0, 2.0, 0.5),
        (12.0, 2.0, 1.0),
        (14.0, 1.0, 0.3),
        (8.0, 1.0, 3.0),
    ):
        student = sharpness * torch.randn(2, size, generator=g)
        student[:, :20] += head * torch.rand(2, 20, generator=g)  # a few likely tokens, as language models have
        teacher = student + gap * torch.randn(2, size, generator=g)
        logp_student, logp_teacher = student.log_softmax(-1), teacher.log_softmax(-1)
        for epsilon in (0.001, 0.01, 0.1, 1.0):
            budget = torch.full((2,), epsilon)
            solution = solve_beta(logp_student, logp_teacher, budget)[2]
            assert (solution.kl_N <= epsilon).all()
            binding = solution.beta_N < 1
            assert (solution.kl_N[binding] >= epsilon * (1 - 1e-3) - 2e-6).all()
            passes.append(solution.passes_N)
    passes = torch.cat(passes)
    assert passes.mean() <= 3.0 and passes.max() <= 6, passes
    log_mu = blend(logp_student, logp_teacher, 0.02).log_mu
    assert 0.0199 < true_kl(log_mu[0], logp_student[0]) <= 0.02


def test_rows_do_not_disturb_each_other():
    logp_student, logp_teacher = pair(30, 40, gap=2.0, dtype=torch.float64)
    epsilon = torch.logspace(-4, 1, 30, dtype=torch.float64)
    epsilon[::7] = 0
    together = blend(logp_student, logp_teacher, epsilon)
    for i in range(30):
        alone = blend(logp_student[i], logp_teacher[i], float(epsilon[i]))
        torch.testing.assert_close(alone, Blend(*(x[i] for x in together)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [(), (0,), (3,), (2, 1, 3), (4, 0)])
def test_batch_shapes(batch):
    logp = torch.randn(*batch, 9).log_softmax(-1)
    for epsilon in (0.1, torch.tensor(0.1), torch.full(batch, 0.1)):
        log_mu, beta, kl = blend(logp, logp.roll(1, -1), epsilon)
        assert log_mu.shape == (*batch, 9) and beta.shape == kl.shape == batch


def test_no_gradient_and_inputs_untouched():
    logp_student, logp_teacher = pair(3, 20, gap=1.0)
    before = logp_student.clone(), logp_teacher.clone()
    result = blend(logp_student.requires_grad_(), logp_teacher, 0.05)
    assert not result.log_mu.requires_grad
    assert torch.equal(logp_student, before[0]) and torch.equal(logp_teacher, before[1])


@pytest.mark.parametrize("broken", ["student", "teacher"])
def test_nan_stays_visible_in_its_row(broken):
    logp_student, logp_teacher = pair(3, 20, gap=1.0)
    (logp_student if broken == "student" else logp_teacher)[1, 4] = math.nan
    result = blend(logp_student, logp_teacher, 0.05)
    assert result.log_mu.isnan().any(-1).tolist() == [False, True, False]
    assert result.beta.isnan().tolist() == result.kl.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epsilon": -0.1}, "-0.1"),
        ({"epsilon": math.nan}, "nan"),
        ({"epsilon": INF}, "finite"),
        ({"epsilon": torch.tensor([0.1, -1.0, 0.1])}, "-1.0"),
        ({"epsilon": torch.ones(2)}, "shape"),
        ({"logp_teacher": torch.zeros(3, 5)}, "shape"),
        ({"logp_student": torch.zeros(3, 0), "logp_teacher": torch.zeros(3, 0)}, "empty"),
        ({"tolerance": 0.0}, "tolerance"),
    ],
)
def test_wrong_input(change, words):
    given = {"logp_student": torch.zeros(3, 4), "logp_teacher": torch.zeros(3, 4), "epsilon": 0.1} | change
    with pytest.raises(ValueError, match=words):
        blend(**given)


def test_memory_that_is_kept_between_calls_leaves_nothing_behind():
    """Larger, smaller, of another dtype, in inference mode and outside, and in a thread beside: all as alone."""
    pairs = [pair(rows, size, gap=2.0, dtype=dtype) for rows, size, dtype in (
        (30, 40, torch.float32), (3, 50, torch.float32), (30, 40, torch.float64), (31, 41, torch.float32))]  # fmt: skip
    alone = []
    for logp_student, logp_teacher in pairs:
        trust_region._SCRATCH.buffers.clear()
        alone.append(blend(logp_student, logp_teacher, 0.1).log_mu)
    with torch.inference_mode():
        blend(*pairs[0], 0.1)
    with ThreadPoolExecutor(2) as pool:
        for expected, log_mu in zip(alone * 5, pool.map(lambda two: blend(*two, 0.1).log_mu, pairs * 5), strict=True):
            assert torch.equal(expected, log_mu)
    for expected, two in zip(alone, pairs, strict=True):
        assert torch.equal(expected, blend(*two, 0.1).log_mu)
