"""Every rollout policy against its definition in plain float64 loops, and the registry with a policy of a user's."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

from verl_trb import policies
from verl_trb.parameters import Parameter
from verl_trb.policies import behavior, from_log_mu, get_policy, guided, policy_names, register_policy
from verl_trb.trust_region import blend
from verl_trb.vocabulary import SharedVocabulary

INF = math.inf


# ------------------------------------------------------------------------------------------ definitions


def teacher_mix(q: np.ndarray, p: np.ndarray, *, alpha: float) -> np.ndarray:
    return alpha * p + (1 - alpha) * q


def fixed_beta(q: np.ndarray, p: np.ndarray, *, beta: float) -> np.ndarray:
    if beta == 1:
        return p
    mu = oracles.geometric(q, p, beta)
    return q if mu is None else mu


def skd(q: np.ndarray, p: np.ndarray, *, k: int, temperature: float) -> np.ndarray:
    """What happens to each draft, added up: y ~ q stays if it is in the top k of p, else it becomes y' ~ p^(1/τ)."""
    top = [token for token in sorted(range(len(p)), key=lambda token: -p[token])[:k] if p[token] > 0]
    power = np.array([value ** (1 / temperature) if value > 0 else 0.0 for value in p / p.max()])
    mu = np.zeros_like(q)
    for draft, chance in enumerate(q):
        if draft in top:
            mu[draft] += chance
        else:
            mu += chance * power / power.sum()
    return mu


def tempered(q: np.ndarray, p: np.ndarray, *, temperature: float) -> np.ndarray:
    power = np.array([value ** (1 / temperature) if value > 0 else 0.0 for value in q / q.max()])
    return power / power.sum()


# policy: its definition
DEFINITIONS: dict[str, Callable[..., np.ndarray]] = {
    "student": lambda q, p: q,
    "teacher": lambda q, p: p,
    "teacher_mix": teacher_mix,
    "fixed_beta": fixed_beta,
    "skd": skd,
    "temperature": tempered,
}
TRUST_REGION = ["fixed_epsilon", "saki", "trb"]  # its definition is in test_trust_region.py


def parameters(name: str, draw: random.Random, size: int) -> dict[str, float]:
    """A draw of a policy's parameters for a vocabulary of some size."""
    draws: dict[str, dict[str, float]] = {
        "teacher_mix": {"alpha": draw.choice([0, 0.2, draw.random(), 1])},
        "fixed_beta": {"beta": draw.choice([0, draw.random(), 0.999, 1])},
        "skd": {"k": draw.randint(1, size), "temperature": draw.choice([0.2, 0.6, 1.0, 2.0])},
        "temperature": {"temperature": draw.choice([0.3, 0.8, 1.7])},
        **{trust_region: {"epsilon": draw.choice([0.001, 0.02, 0.3, 5.0])} for trust_region in TRUST_REGION},
    }
    return draws.get(name, {})


def logits(draw: random.Random, size: int) -> tuple[Tensor, Tensor]:
    """One row of each model: flat or peaked, with equal values, with tokens that both, or only one, give 0."""
    scale = draw.choice([0.3, 2.0, 8.0])
    rows = torch.tensor([[draw.gauss(0, scale) for _ in range(size)] for _ in range(2)], dtype=torch.float64)
    if draw.random() < 0.5:
        rows = rows.round()  # ties
    live = draw.randrange(size)  # some token is left to both
    for row in draw.choice([[], [rows], [rows[0]], [rows[1]], [rows[0], rows[1]]]):
        tokens = [token for token in draw.sample(range(size), size // 3) if token != live]
        row[..., tokens] = -INF
    return rows[0], rows[1]


def cases(seed: int, count: int) -> Iterator[tuple[random.Random, Tensor, Tensor]]:
    """Seeded pairs of log-probabilities [N, V] of random N and V, float64."""
    draw = random.Random(seed)
    for _ in range(count):
        size = draw.choice([2, 3, 5, 17, 60])
        pairs = [logits(draw, size) for _ in range(draw.randint(1, 4))]
        student_NV, teacher_NV = (torch.stack(rows).log_softmax(-1) for rows in zip(*pairs, strict=True))
        yield draw, student_NV, teacher_NV


def test_every_policy_has_a_definition():
    assert policy_names() == sorted([*DEFINITIONS, *TRUST_REGION])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DEFINITIONS)
def test_policy_is_its_definition(name: str, dtype: torch.dtype):
    """μ, its normalization and KL(μ‖π_S), at random shapes and parameters.

    The definition is given the rounded probabilities as they are: in bfloat16 their sum is not 1, and what a policy
    does not normalize itself inherits that.
    """
    close = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-5}[dtype]
    for draw, student_NV, teacher_NV in cases(seed=sum(map(ord, name)), count=100):
        student_NV, teacher_NV = student_NV.to(dtype), teacher_NV.to(dtype)
        values = parameters(name, draw, student_NV.shape[1])
        log_mu_NV, _, kl_N = get_policy(name)(student_NV, teacher_NV, **values)
        assert log_mu_NV.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for row, log_mu_V in enumerate(log_mu_NV):
            q, p = (np.exp(logp_NV[row].double().numpy()) for logp_NV in (student_NV, teacher_NV))
            mu = DEFINITIONS[name](q, p, **values)
            np.testing.assert_allclose(np.exp(log_mu_V.double().numpy()), mu, rtol=20 * close, atol=close)
            if dtype != torch.bfloat16:
                mu[mu < torch.finfo(dtype).tiny] = 0
                assert float(kl_N[row]) == pytest.approx(oracles.kl(mu, q), rel=100 * close, abs=10 * close)


@pytest.mark.parametrize("name", policy_names())
def test_the_value_that_means_the_student_does(name: str):
    """`student_at` is why a step with that value asks nobody: μ must be π_S there, at any other parameters."""
    policy = get_policy(name)
    named = {key: p.student_at for key, p in policy.parameters.items() if p.student_at is not None}
    for key, value in named.items():
        for draw, student_NV, teacher_NV in cases(seed=1, count=20):
            values = parameters(name, draw, student_NV.shape[1]) | {key: value}
            torch.testing.assert_close(policy(student_NV, teacher_NV, **values).log_mu.exp(), student_NV.exp())
    assert bool(named) == (name not in ("student", "teacher", "skd"))


def test_policies_that_do_not_ask_the_teacher():
    """`needs_teacher=False` exactly where the teacher changes nothing."""
    for name in policy_names():
        changed = False
        for draw, student_NV, teacher_NV in cases(seed=2, count=20):
            values = parameters(name, draw, student_NV.shape[1])
            a, b = (get_policy(name)(student_NV, logp, **values).log_mu for logp in (teacher_NV, student_NV))
            changed |= not torch.equal(a, b)
        assert changed == get_policy(name).needs_teacher, name


def test_skd_with_ties_takes_the_lowest_ids():
    student = torch.full((1, 6), 1 / 6).log()
    teacher = torch.tensor([[0.1, 0.2, 0.2, 0.2, 0.2, 0.1]]).log()
    mu = get_policy("skd")(student, teacher, k=2, temperature=1.0).log_mu.exp()
    expected = torch.tensor([[0.1, 0.2, 0.2, 0.2, 0.2, 0.1]]) * 4 / 6 + torch.tensor([[0, 1, 1, 0, 0, 0]]) / 6
    torch.testing.assert_close(mu, expected)


def test_skd_keeps_nothing_the_teacher_gives_zero():
    student = torch.tensor([[0.5, 0.3, 0.2]]).log()
    teacher = torch.tensor([[0.0, 1.0, 0.0]]).log()
    log_mu = get_policy("skd")(student, teacher, k=3, temperature=0.6).log_mu
    torch.testing.assert_close(log_mu.exp(), torch.tensor([[0.0, 1.0, 0.0]]))


def test_skd_refuses_a_k_larger_than_the_vocabulary():
    with pytest.raises(ValueError, match="at most the vocabulary's size 3, but is 4"):
        get_policy("skd")(torch.zeros(1, 3), torch.zeros(1, 3), k=4)


def test_skd_accepts_more_drafts_than_its_own_rule():
    """The coupling accepts with probability 1 − TV(μ, π_S), which no rule exceeds; SKD's accepts π_S(top-k)."""
    more = 0.0
    for draw, student_NV, teacher_NV in cases(seed=3, count=50):
        values = parameters("skd", draw, student_NV.shape[1])
        mu_NV = get_policy("skd")(student_NV, teacher_NV, **values).log_mu.exp()
        ours_N = torch.minimum(mu_NV, student_NV.exp()).sum(-1)
        top = teacher_NV.sort(dim=-1, descending=True, stable=True).indices[:, : int(values["k"])]
        theirs_N = student_NV.exp().masked_fill(teacher_NV == -INF, 0).gather(-1, top).sum(-1)
        assert (ours_N >= theirs_N - 1e-9).all()
        more = max(more, float((ours_N - theirs_N).max()))
    assert more > 0.1


def test_geometric_blend_of_disjoint_supports_is_the_student():
    student, teacher = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.0, 0.0, 1.0]]).log()
    result = get_policy("fixed_beta")(student, teacher, beta=0.5)
    torch.testing.assert_close(result.log_mu, student)
    assert float(result.kl) == 0


# ------------------------------------------------------------------------------------------ rows of a batch


def pair(rows: int = 6, size: int = 20) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(rows, size, generator=g).log_softmax(-1) for _ in range(2)]


@pytest.mark.parametrize("name", policy_names())
def test_rows_without_parameters_are_the_student_bitwise(name: str):
    """Among guided rows of two different values, which are as if they were alone."""
    student_NV, teacher_NV = pair()
    policy, draw = get_policy(name), random.Random(5)
    one, two = (parameters(name, draw, 20) for _ in range(2))
    result = guided(policy, [one, None, two, one, None, two], student_NV, teacher_NV)
    assert torch.equal(result.log_mu[[1, 4]], student_NV[[1, 4]])
    assert not result.beta[[1, 4]].any() and not result.kl[[1, 4]].any()
    for values, rows in ((one, [0, 3]), (two, [2, 5])):
        torch.testing.assert_close(result.log_mu[rows], policy(student_NV[rows], teacher_NV[rows], **values).log_mu)
    nobody = guided(policy, [None] * 6, student_NV, None)
    assert nobody.log_mu is student_NV and not nobody.beta.any() and not nobody.kl.any()


def test_a_skipped_teacher_is_not_invented():
    student_NV, teacher_NV = pair()
    with pytest.raises(RuntimeError, match="'trb' reached the engine while the teacher was skipped"):
        guided(get_policy("trb"), [{"epsilon": 0.1}] * 6, student_NV, None)
    values = {"temperature": 0.7}
    alone = guided(get_policy("temperature"), [values] * 6, student_NV, None)
    assert torch.equal(alone.log_mu, get_policy("temperature")(student_NV, teacher_NV, **values).log_mu)


# ------------------------------------------------------------------------------------------ registry


@pytest.fixture
def registry(monkeypatch):
    """Registrations of a test are undone after it."""
    monkeypatch.setattr(policies, "_POLICIES", dict(policies._POLICIES))


def test_student_is_bitwise_and_costs_nothing():
    logp_student, logp_teacher = pair()
    log_mu, beta, kl = get_policy("student")(logp_student, logp_teacher)
    assert torch.equal(log_mu, logp_student) and not beta.any() and not kl.any()


@pytest.mark.parametrize("name", ["trb", "fixed_epsilon", "saki"])
def test_trb_is_the_trust_region(name: str):
    logp_student, logp_teacher = pair()
    for epsilon in (0.0, 0.001, 0.01, 0.1, 1.0, 10.0):
        result = get_policy(name)(logp_student, logp_teacher, epsilon=epsilon)
        expected = blend(logp_student, logp_teacher, epsilon)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_the_readme_s_policy(registry, tmp_path: Path):
    """In a file of one's own, which is run once."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    (tmp_path / "mine.py").write_text(code)
    policy = get_policy(f"{tmp_path}/mine.py:either")
    assert policy is get_policy(f"{tmp_path}/mine.py:either") is get_policy("either")
    assert (policy.parameters, policy.defaults) == ({"weight": Parameter(0, 1, above=True)}, {"weight": 1.0})
    logp_student, logp_teacher = pair()
    result = policy(logp_student, logp_teacher, weight=0.5)
    larger = torch.maximum(logp_student.exp(), logp_teacher.exp() / 2)
    torch.testing.assert_close(result.log_mu.exp(), larger / larger.sum(-1, keepdim=True))
    assert result.beta.isnan().all()
    for i in range(6):
        expected = oracles.kl(oracles.probabilities(result.log_mu[i]), oracles.probabilities(logp_student[i]))
        assert float(result.kl[i]) == pytest.approx(expected, rel=1e-4)


def test_parameters_are_the_keyword_only_arguments(registry):
    @register_policy("mine", needs_teacher=False, b=Parameter(0, 1))
    def mine(logp_student_NV, logp_teacher_NV, *, a, b, c=0.5):
        raise NotImplementedError

    policy = get_policy("mine")
    assert policy.parameters == {"a": Parameter(), "b": Parameter(0, 1), "c": Parameter()}
    assert (policy.defaults, policy.needs_teacher, policy.warmup) == ({"c": 0.5}, False, False)


def test_files_that_cannot_be_run_or_lack_the_policy(registry, tmp_path: Path):
    with pytest.raises(ValueError, match="nowhere.py cannot be run: FileNotFoundError"):
        get_policy(f"{tmp_path}/nowhere.py:mine")
    (tmp_path / "broken.py").write_text("import math\nmath.sqrt(-1)\n")
    with pytest.raises(ValueError, match="broken.py cannot be run: ValueError: math domain error"):
        get_policy(f"{tmp_path}/broken.py:mine")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="There is no rollout policy 'teecher'; did you mean 'teacher'"):
        get_policy(f"{tmp_path}/empty.py:teecher")


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
    assert get_policy("trb").rule is policies.trb


@pytest.mark.parametrize(
    ("parameter", "good", "bad", "said"),
    [
        (Parameter(0, 1), [0, 0.5, 1], [-0.1, 1.1, math.nan], "a number between 0 and 1"),
        (Parameter(low=0, above=True), [1e-9, 5], [0, -1, math.inf], "a number > 0"),
        (Parameter(low=1, whole=True), [1, 7, 7.0], [0, 1.5], "a whole number >= 1"),
        (Parameter(), [-5, 0, 5.5], [math.inf], "a number"),
    ],
)
def test_values_of_a_parameter(parameter: Parameter, good: list[float], bad: list[float], said: str):
    assert all(map(parameter.takes, good)) and not any(map(parameter.takes, bad))
    assert str(parameter) == said


def test_behavior_reads_the_teachers_raw_logits():
    """Padding rows are cut, the temperature divides, both EOS are one event, masked ids are gone: by hand."""
    g = torch.Generator().manual_seed(1)
    size, eos, other = 10, 2, 7
    vocabulary = SharedVocabulary(size, student_eos=eos, teacher_eos=other, masked=(4, other), marker=4)
    logp_student = torch.randn(4, size, generator=g).index_fill(-1, torch.tensor([4, other]), -INF).log_softmax(-1)
    raw, temperature = torch.randn(4, size + 6, generator=g), torch.tensor([0.5, 1.0, 2.0, 1.0])
    p = (raw.double()[:, :size] / temperature[:, None]).softmax(-1)
    p[:, eos] += p[:, other]
    p[:, [4, other]] = 0
    p /= p.sum(-1, keepdim=True)
    epsilons = [0.01, 0.1, 100.0, 0.0]
    params = [{"epsilon": epsilon} for epsilon in epsilons[:3]] + [None]
    how = {"vocabulary": vocabulary, "temperature_N": temperature}
    result = behavior(get_policy("trb"), params, logp_student, raw, **how)
    expected = blend(logp_student, p.log().float(), torch.tensor(epsilons))
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    unguided = behavior(get_policy("trb"), [None] * 4, logp_student, None, **how)
    assert torch.equal(unguided.log_mu, logp_student) and not unguided.kl.any()
