"""The registry of rollout policies, and a policy written by a user."""

from __future__ import annotations

import math

import oracles
import pytest
import torch

from verl_trb import policies
from verl_trb.policies import behavior, from_log_mu, get_policy, policy_names, register_policy
from verl_trb.trust_region import blend
from verl_trb.vocabulary import SharedVocabulary


def pair(rows=6, size=20):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(rows, size, generator=g).log_softmax(-1) for _ in range(2)]


@pytest.fixture
def registry(monkeypatch):
    """Registrations of a test are undone after it."""
    monkeypatch.setattr(policies, "_POLICIES", dict(policies._POLICIES))


def test_student_ignores_teacher_and_budget():
    logp_student, logp_teacher = pair()
    log_mu, beta, kl = get_policy("student")(logp_student, logp_teacher, torch.ones(6))
    assert torch.equal(log_mu, logp_student) and not beta.any() and not kl.any()


def test_trb_is_the_trust_region():
    logp_student, logp_teacher = pair()
    epsilon = torch.tensor([0.0, 0.001, 0.01, 0.1, 1.0, 10.0])
    result = get_policy("trb")(logp_student, logp_teacher, epsilon)
    expected = blend(logp_student, logp_teacher, epsilon)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    assert result.beta[0] == 0 and result.beta[-1] == 1


def test_a_policy_in_ten_lines(registry):
    @register_policy("teacher_mix")
    def teacher_mix(logp_student_NV, logp_teacher_NV, epsilon_N, *, alpha=0.2):
        log_mu_NV = torch.logaddexp(logp_student_NV + math.log(1 - alpha), logp_teacher_NV + math.log(alpha))
        return from_log_mu(log_mu_NV, logp_student_NV)

    logp_student, logp_teacher = pair()
    result = get_policy("teacher_mix")(logp_student, logp_teacher, 0.0, alpha=0.5)
    assert "teacher_mix" in policy_names()
    torch.testing.assert_close(result.log_mu.exp(), (logp_student.exp() + logp_teacher.exp()) / 2)
    assert result.beta.isnan().all()
    for i in range(6):
        expected = oracles.kl(oracles.probabilities(result.log_mu[i]), oracles.probabilities(logp_student[i]))
        assert float(result.kl[i]) == pytest.approx(expected, rel=1e-4)


def test_from_log_mu_with_missing_tokens():
    mu = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]).log()
    student = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]).log()
    kl = from_log_mu(mu, student).kl
    expected = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), math.log(2), math.inf]
    assert kl.tolist() == pytest.approx(expected, rel=1e-5)


def test_unknown_name_is_answered_with_near_ones():
    with pytest.raises(ValueError, match="did you mean 'student'"):
        get_policy("studnet")
    with pytest.raises(ValueError, match="student.*trb"):
        get_policy("zzz")


def test_a_name_is_taken_once(registry):
    with pytest.raises(ValueError, match="'trb' is registered already"):
        register_policy("trb")(lambda *_: None)
    assert get_policy("trb") is policies.trb
    assert policy_names() == ["student", "trb"]


def test_behavior_reads_the_teachers_raw_logits():
    """Padding rows are cut, the temperature divides, both EOS are one event, masked ids are gone: by hand."""
    g = torch.Generator().manual_seed(1)
    size, eos, other = 10, 2, 7
    vocabulary = SharedVocabulary(size, student_eos=eos, teacher_eos=other, masked=(4, other), marker=4)
    logp_student = torch.randn(3, size, generator=g).index_fill(-1, torch.tensor([4, other]), -math.inf).log_softmax(-1)
    raw, temperature = torch.randn(3, size + 6, generator=g), torch.tensor([0.5, 1.0, 2.0])
    teacher = (raw.double()[:, :size] / temperature[:, None]).softmax(-1)
    teacher[:, eos] += teacher[:, other]
    teacher[:, [4, other]] = 0
    teacher = (teacher / teacher.sum(-1, keepdim=True)).log().float()
    epsilon = torch.tensor([0.01, 0.1, 100.0])
    result = behavior("trb", logp_student, raw, epsilon, vocabulary=vocabulary, temperature_N=temperature)
    expected = blend(logp_student, teacher, epsilon)
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(behavior("student", logp_student, raw, epsilon, vocabulary=vocabulary).log_mu, logp_student)
