"""The Triton kernel against bisection in float64 and against the torch solver.

Runs where Triton does: in its interpreter (TRITON_INTERPRET=1; tests/test_trust_region_triton.py starts it so), or on
a GPU (scripts/gpu_check.sh). Not collected by default: Triton reads the variable when it is first imported.
"""

from __future__ import annotations

import math
import os

import oracles
import pytest
import torch

from verl_trb.kernels.trust_region_triton import blend_logits
from verl_trb.trust_region import blend
from verl_trb.vocabulary import SharedVocabulary, canonicalize

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
EPSILONS = (0.0, 1e-4, 1e-3, 0.02, 0.3, 1.0, 10.0)
SLACK = 3e-6  # what float32 may cost in nats

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, in the interpreter


def solve(student_NV, teacher_NV, epsilon_N, **options):
    """The kernel's Blend on the CPU, and its passes."""
    moved = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    blended, passes_N = blend_logits(student_NV.to(DEVICE), teacher_NV.to(DEVICE), epsilon_N.to(DEVICE), **moved)
    return type(blended)(*(x.cpu() for x in blended)), passes_N.cpu()


def random_pair(generator, rows, size, gap, dtype, missing):
    """Student log-probabilities and teacher logits (not normalized); `missing` is the share of tokens that are -inf
    in the student, the teacher, or both."""
    student = 3 * torch.randn(rows, size, generator=generator)
    teacher = student + gap * torch.randn(rows, size, generator=generator) + 7
    kind = torch.rand(rows, size, generator=generator)
    kind[:, 0] = 1  # somebody must live
    student = student.masked_fill(kind < 2 * missing / 3, -math.inf)
    teacher = teacher.masked_fill((kind > missing / 3) & (kind < missing), -math.inf)
    return student.log_softmax(-1).to(dtype), teacher.to(dtype)


def check(blended, logp_student_NV, logp_teacher_NV, epsilon_N):
    """Every row: inside the region, the budget used, log mu the mixture it should be; exact at both ends."""
    ours = blend(logp_student_NV, logp_teacher_NV, epsilon_N)
    assert blended.log_mu.dtype == torch.float32 and not blended.log_mu.isnan().any()
    # Both solvers accept KL within the tolerance of the budget: beta may differ by that, and hardly ever does.
    torch.testing.assert_close(blended.beta, ours.beta, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(blended.kl, ours.kl, rtol=1e-3, atol=SLACK)
    assert float((blended.beta - ours.beta).abs().median()) < 1e-4
    for i in range(len(epsilon_N)):
        epsilon, beta = float(epsilon_N[i]), float(blended.beta[i])
        p_student, p_teacher = (oracles.probabilities(x[i]) for x in (logp_student_NV, logp_teacher_NV))
        p_mu = oracles.probabilities(blended.log_mu[i])
        if beta == 0:
            assert torch.equal(blended.log_mu[i], logp_student_NV[i].float()) and blended.kl[i] == 0
        spent = oracles.kl_fast(p_mu, p_student)
        assert spent <= epsilon + SLACK / 10, "outside the trust region"
        assert float(blended.kl[i]) == pytest.approx(spent, rel=1e-4, abs=SLACK)
        best = oracles.bisect_beta(p_student, p_teacher, epsilon) if epsilon > 0 else 0.0
        if best < 1 and epsilon > 0:
            optimum = oracles.kl_fast(oracles.geometric(p_student, p_teacher, best), p_student)
            assert spent >= optimum - 1.001e-3 * epsilon - SLACK, "budget not used"
        expected = oracles.geometric(p_student, p_teacher, beta)
        assert abs(p_mu - expected).max() < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize(("size", "block"), [(2, None), (17, 16), (64, 64), (301, 64), (1500, None)])
@pytest.mark.parametrize("gap", [0.05, 1.0, 6.0])
def test_equals_the_torch_solver_and_bisection(dtype, missing, size, block, gap):
    generator = torch.Generator().manual_seed(size + int(10 * gap))
    logp_student_NV, teacher_NV = random_pair(generator, len(EPSILONS), size, gap, dtype, missing)
    epsilon_N = torch.tensor(EPSILONS)
    blended, passes_N = solve(logp_student_NV, teacher_NV, epsilon_N, block=block)
    check(blended, logp_student_NV, teacher_NV.float().log_softmax(-1), epsilon_N)
    assert passes_N[0] == 0 and passes_N.max() <= 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("same_eos", [False, True])
def test_reads_what_canonicalize_makes(dtype, same_eos):
    """Padding rows, mask, EOS merge and temperature in the read: as canonicalize, softmax and blend."""
    generator = torch.Generator().manual_seed(3)
    rows, size = 12, 90
    masked = (11, 40, 71)
    vocabulary = SharedVocabulary(size, student_eos=5, teacher_eos=5 if same_eos else 40, masked=masked, marker=11)
    student_NV = canonicalize(torch.randn(rows, size, generator=generator), vocabulary, "student").log_softmax(-1)
    padded_NV = (2 * torch.randn(rows, size + 38, generator=generator)).to(dtype)
    padded_NV[0, [5, 40]] = -math.inf  # a teacher that cannot stop
    temperature_N = torch.linspace(0.5, 2, rows)
    epsilon_N = torch.logspace(-3, 0.5, rows)
    options = {"vocabulary": vocabulary, "temperature_N": temperature_N, "block": 32}
    blended, _ = solve(student_NV, padded_NV, epsilon_N, **options)
    shared_NV = canonicalize(padded_NV[:, :size].float() / temperature_N[:, None], vocabulary, "teacher")
    check(blended, student_NV, shared_NV.log_softmax(-1), epsilon_N)
    assert (blended.log_mu[:, list(masked)] == -math.inf).all()
    # Rows that are strided, as a slice of the engine's logits is.
    wide_NV = torch.cat([padded_NV, padded_NV], dim=1)[:, : size + 38]
    again, _ = solve(student_NV, wide_NV, epsilon_N, **options)
    assert all(torch.equal(a, b) for a, b in zip(again, blended, strict=True))


def test_exact_cases():
    generator = torch.Generator().manual_seed(4)
    logp_student_NV, teacher_NV = random_pair(generator, 4, 200, 0.3, torch.float32, 0.0)
    blended, passes_N = solve(logp_student_NV, teacher_NV, torch.zeros(4))
    assert torch.equal(blended.log_mu, logp_student_NV) and not passes_N.any() and not blended.kl.any()
    blended, _ = solve(logp_student_NV, teacher_NV, torch.full((4,), 5.0))
    assert (blended.beta == 1).all()
    torch.testing.assert_close(blended.log_mu, teacher_NV.log_softmax(-1), rtol=1e-6, atol=2e-6)
    blended, _ = solve(logp_student_NV, logp_student_NV, torch.full((4,), 1e-3))  # teacher = student
    torch.testing.assert_close(blended.log_mu, logp_student_NV, rtol=1e-6, atol=2e-6)
    assert blended.kl.max() < 1e-6
    disjoint = torch.tensor([[0.0, -math.inf], [0.0, -math.inf]])
    blended, _ = solve(disjoint, disjoint.flip(-1), torch.tensor([1e9, 0.1]))
    assert torch.equal(blended.log_mu, disjoint) and not blended.beta.any()


@pytest.mark.parametrize("low", [-50.0, -600.0, -1e4, -1e9])
def test_masks_made_of_large_negative_numbers(low):
    generator = torch.Generator().manual_seed(5)
    logp_student_NV, teacher_NV = random_pair(generator, 6, 50, 1.0, torch.float32, 0.0)
    logp_student_NV[:3, :5] = low
    teacher_NV[3:, 10:15] = low
    logp_student_NV = logp_student_NV.log_softmax(-1)
    epsilon_N = torch.tensor([1e-3, 0.05, 2.0] * 2)
    blended, _ = solve(logp_student_NV, teacher_NV, epsilon_N, block=16)
    check(blended, logp_student_NV, teacher_NV.log_softmax(-1), epsilon_N)


def test_a_teacher_far_below_the_student():
    """log pi_T - log pi_S is near -500 but for one token: no digits may be lost to the common part."""
    generator = torch.Generator().manual_seed(6)
    logp_student_NV, teacher_NV = random_pair(generator, 6, 40, 0.05, torch.float32, 0.0)
    logp_student_NV[:, 0], teacher_NV[:, 0] = -600.0, 500.0
    logp_student_NV = logp_student_NV.log_softmax(-1)
    epsilon_N = torch.full((6,), 1e-4)
    blended, _ = solve(logp_student_NV, teacher_NV, epsilon_N)
    for log_mu_V, logp_V in zip(blended.log_mu, logp_student_NV, strict=True):
        spent = oracles.kl_fast(oracles.probabilities(log_mu_V), oracles.probabilities(logp_V))
        assert 1e-4 - 3e-6 < spent <= 1e-4


def test_sure_models_that_disagree():
    """Each all but certain of its own token: KL is like a step in beta, on which Newton's steps alone creep."""
    student = torch.tensor([[gap, 0.0, 0.0] for gap in (8.0, 12.0, 17.0, 25.0, 40.0)])
    teacher_NV = torch.stack([torch.tensor([0.0, row[0], row[0] / 2]) for row in student])
    for epsilon in (0.003, 0.02, 0.3, 1.0, 5.0):
        epsilon_N = torch.full((5,), epsilon)
        blended, passes_N = solve(student.log_softmax(-1), teacher_NV, epsilon_N)
        check(blended, student.log_softmax(-1), teacher_NV.log_softmax(-1), epsilon_N)
        assert passes_N.max() <= 40


def test_nan_stays_visible_in_its_row():
    for broken in (0, 1):
        generator = torch.Generator().manual_seed(7)
        pair = random_pair(generator, 3, 20, 1.0, torch.float32, 0.0)
        pair[broken][1, 4] = math.nan
        blended, _ = solve(*pair, torch.full((3,), 0.05))
        assert blended.log_mu.isnan().any(-1).tolist() == [False, True, False]
        assert blended.beta.isnan().tolist() == [False, True, False]


def test_out_of_passes_stays_feasible():
    generator = torch.Generator().manual_seed(8)
    logp_student_NV, teacher_NV = random_pair(generator, 8, 200, 5.0, torch.float32, 0.0)
    for max_passes in (1, 2, 3):
        blended, passes_N = solve(
            logp_student_NV, teacher_NV, torch.full((8,), 0.1), tolerance=1e-4, max_passes=max_passes
        )
        assert passes_N.max() <= max_passes and (blended.kl <= 0.1).all()


def test_wrong_shapes():
    with pytest.raises(ValueError, match="at least 5"):
        solve(torch.zeros(2, 5), torch.zeros(2, 4), torch.zeros(2))
    vocabulary = SharedVocabulary(6, student_eos=0, teacher_eos=0, masked=(1,), marker=1)
    with pytest.raises(ValueError, match="6 ids"):
        solve(torch.zeros(2, 5), torch.zeros(2, 8), torch.zeros(2), vocabulary=vocabulary)
