"""Every loss, value and gradient, against its definition in float64; single samples; the registry."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import loss_oracles
import pytest
import torch
from loss_oracles import Row
from torch import Tensor

from verl_trb import divergences
from verl_trb.chunked_loss import loss_from_layers, loss_from_logits
from verl_trb.divergences import (
    Integrand,
    Prefixes,
    divergence_names,
    get_divergence,
    register_divergence,
    sampled_advantage,
)
from verl_trb.parameters import Parameter
from verl_trb.trust_region import blend
from verl_trb.vocabulary import canonicalize, share_vocabulary

INF = math.inf
ROWS, SIZE, K = 7, 13, 4
TOKENS = torch.tensor([0, 3, 4, 5, 8, 10, 12])
CORRECTED = torch.tensor([True, False, True, False, False, True, False])
ROW = [Row(int(t), bool(c)) for t, c in zip(TOKENS, CORRECTED, strict=True)]
# The logits below have teacher entropies between 1.2 and 2.1 nats: the threshold of 1.6 divides them.
CASES: list[tuple[str, dict[str, float]]] = [
    ("reverse_kl", {}),
    ("forward_kl", {}),
    ("jsd", {"beta": 0.1}),
    ("jsd", {"beta": 0.9}),
    ("skew_forward", {"alpha": 0.1}),
    ("skew_reverse", {"alpha": 0.1}),
    ("veto", {"beta": 0.0}),
    ("veto", {"beta": 0.6}),
    ("veto", {"beta": 1.0}),
    ("eopd", {"threshold": 1.6, "weight": 0.7}),
    ("saki", {}),
    ("cross_entropy", {}),
]
FORMS = [
    *(("full", name, params) for name, params in CASES),
    *(("topk", name, params) for name, params in CASES if "topk" in get_divergence(name).modes),
]
PRECISION = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 4e-3},
}
forms = pytest.mark.parametrize(("mode", "name", "params"), FORMS)


def logits(rows: int = ROWS, size: int = SIZE, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [(2.0 * torch.randn(rows, size, generator=g, dtype=torch.float64)).to(dtype) for _ in range(2)]


def oracle(mode: str, name: str, params: dict[str, float]) -> Callable[[Tensor, Tensor, Row], Tensor]:
    return partial(getattr(loss_oracles, f"topk_{name}" if mode == "topk" else name), **params, **k_of(mode))


def k_of(mode: str) -> dict[str, int]:
    return {"k": K} if mode == "topk" else {}


def reference(of_row: Callable[..., Tensor], student: Tensor, teacher: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each row and the gradient of sum(weight * loss), row by row in float64."""
    leaf = student.double().detach().clone().requires_grad_()
    loss = torch.stack([of_row(leaf[i], teacher[i].double(), ROW[i]) for i in range(len(leaf))])
    (loss * weight.double()).sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def compute(mode: str, name: str, params: dict[str, float], student: Tensor, teacher: Tensor, **how: object) -> Tensor:
    rule = get_divergence(name).rule(mode, K, params)
    more = {"token_N": TOKENS, "corrected_N": CORRECTED} | how
    return loss_from_logits(student, teacher, divergence=rule, **more).loss_N


def test_every_loss_has_an_oracle():
    assert {name for name, _ in CASES} | {"exopd"} == set(divergence_names())
    threshold = torch.special.entr(logits()[1].softmax(-1)).sum(-1) > 1.6
    assert threshold.any() and not threshold.all()


@pytest.mark.parametrize("dtype", list(PRECISION))
@forms
def test_value_and_gradient(mode: str, name: str, params: dict[str, float], dtype: torch.dtype):
    """In chunks of 3, for a weighting of the tokens; float32 and bfloat16 inputs too."""
    student, teacher = logits(dtype=dtype)
    weight = torch.linspace(-1, 2, ROWS)
    expected, expected_grad = reference(oracle(mode, name, params), student, teacher, weight)
    loss = compute(mode, name, params, student.requires_grad_(), teacher, chunk_tokens=3)
    (loss * weight).sum().backward()
    value = PRECISION[torch.float64 if dtype == torch.float64 else torch.float32]
    torch.testing.assert_close(loss.double(), expected, **value)
    torch.testing.assert_close(student.grad.double(), expected_grad, **PRECISION[dtype])
    assert student.grad.dtype == dtype and loss.dtype == torch.promote_types(dtype, torch.float32)


@forms
def test_chunk_size_changes_nothing(mode: str, name: str, params: dict[str, float]):
    student, teacher = logits()
    results = []
    for chunk_tokens in (1, 3, 100):
        leaf = student.clone().requires_grad_()
        loss = compute(mode, name, params, leaf, teacher, chunk_tokens=chunk_tokens)
        loss.sum().backward()
        results.append((loss.detach(), leaf.grad))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-14)


@forms
@pytest.mark.usefixtures("gradient")
def test_through_output_layers(mode: str, name: str, params: dict[str, float]):
    """Padded rows of different number, two EOS, temperature 0.7; loss, log q of the tokens, gradient of a mixture."""
    ids = {f"t{i}": i for i in range(11)}
    vocabulary = share_vocabulary(ids, ids, student_eos=4, teacher_eos=9, student_rows=13, teacher_rows=12)
    g = torch.Generator().manual_seed(1)
    shapes = ((ROWS, 5), (13, 5), (ROWS, 4), (12, 4))
    hidden, weight, hidden_t, weight_t = (torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes)
    rows = [Row(min(row.token, 8), row.corrected) for row in ROW]
    tokens = torch.tensor([row.token for row in rows])
    a, b = torch.linspace(-1, 2, ROWS).double(), torch.linspace(3, -2, ROWS).double()

    exact = [x.clone().requires_grad_() for x in (hidden, weight)]
    z_s = canonicalize(exact[0] @ exact[1].T / 0.7, vocabulary, "student")
    z_t = canonicalize(hidden_t @ weight_t.T / 0.7, vocabulary, "teacher")
    # The oracles see the tokens that exist; what is masked in both models must not matter.
    live = [i for i in range(11) if i not in vocabulary.masked]
    seen = [Row(live.index(row.token), row.corrected) for row in rows]
    of_row = oracle(mode, name, params)
    expected = torch.stack([of_row(z_s[i, live], z_t[i, live], seen[i]) for i in range(ROWS)])
    logp = z_s.log_softmax(-1)[range(ROWS), tokens]
    (expected * a + logp * b).sum().backward()

    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    out = loss_from_layers(
        leaves[0],
        leaves[1],
        hidden_t,
        weight_t,
        temperature=0.7,
        divergence=get_divergence(name).rule(mode, K, params),
        vocabulary=vocabulary,
        chunk_tokens=3,
        token_N=tokens,
        corrected_N=CORRECTED,
    )
    torch.testing.assert_close(out.loss_N, expected)
    torch.testing.assert_close(
        out.reverse_kl_N,
        torch.stack([loss_oracles.reverse_kl(*z, Row()) for z in zip(z_s[:, live], z_t[:, live], strict=True)]),
    )
    (out.loss_N * a + out.logp_student_N * b).sum().backward()
    for leaf, other in zip(leaves, exact, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad)


@forms
def test_masked_tokens_contribute_nothing(mode: str, name: str, params: dict[str, float]):
    """-inf in both models: loss and gradient as without those columns, and 0 in them."""
    student, teacher = logits()
    gone = [1, 2, 6, 7]
    left = [i for i in range(SIZE) if i not in gone]
    small = student[:, left].clone().requires_grad_()
    tokens = torch.tensor([left.index(int(t)) for t in TOKENS])
    expected = compute(mode, name, params, small, teacher[:, left], token_N=tokens)
    expected.sum().backward()
    student[:, gone], teacher[:, gone] = -INF, -INF
    loss = compute(mode, name, params, student.requires_grad_(), teacher)
    loss.sum().backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(student.grad[:, left], small.grad)
    assert not student.grad[:, gone].any()


FINITE = {"jsd", "skew_forward", "skew_reverse", "cross_entropy"}


@forms
def test_mass_where_the_other_has_none(mode: str, name: str, params: dict[str, float]):
    """Where only one model has -inf the value is the definition's, inf or not; where it is finite so is the gradient,
    and a row of weight 0 poisons no other."""
    student, teacher = logits()
    teacher[3, student[3].argmax()] = -INF
    student[6, 1] = -INF
    expected = torch.stack([oracle(mode, name, params)(student[i], teacher[i], ROW[i]) for i in range(ROWS)])
    loss = compute(mode, name, params, student.requires_grad_(), teacher)
    torch.testing.assert_close(loss.detach(), expected)
    if name in FINITE:
        assert loss.isfinite().all()
    keep = torch.tensor([1.0, 1, 1, 0, 1, 1, 0]) if not loss.isfinite().all() else torch.ones(ROWS)
    (loss.nan_to_num(posinf=0) * keep).sum().backward()
    assert student.grad.isfinite().all()


# Not 0 at teacher = student: the value, the gradient. By construction, see their docstrings.
NONZERO = {
    ("full", "veto", 0.6): (True, True),
    ("full", "veto", 1.0): (True, True),
    ("topk", "veto", 0.6): (True, True),
    ("topk", "veto", 1.0): (True, True),
    ("full", "saki", None): (True, True),
    ("topk", "saki", None): (True, True),
    ("full", "cross_entropy", None): (True, True),
    ("topk", "cross_entropy", None): (True, True),
    ("topk", "forward_kl", None): (False, True),
    ("topk", "eopd", None): (False, True),
}


@forms
def test_identical_models(mode: str, name: str, params: dict[str, float]):
    student, _ = logits()
    student.requires_grad_()
    loss = compute(mode, name, params, student, student.detach().clone())
    loss.sum().backward()
    value, gradient = NONZERO.get((mode, name, params.get("beta")), (False, False))
    assert (loss.abs().max() > 1e-3) == value, loss
    assert (student.grad.abs().max() > 1e-3) == gradient
    if not value:
        assert loss.abs().max() < 1e-12
    if not gradient:
        assert student.grad.abs().max() < 1e-12


@pytest.mark.parametrize("beta", [1e-6, 1 - 1e-6])
def test_generalized_jsd_tends_to_either_kl(beta: float):
    """Divided by beta to forward KL, divided by 1 - beta to reverse KL: GKD's normalization."""
    student, teacher = logits()
    scaled = compute("full", "jsd", {"beta": beta}, student, teacher) / min(beta, 1 - beta)
    other = compute("full", "forward_kl" if beta < 0.5 else "reverse_kl", {}, student, teacher)
    torch.testing.assert_close(scaled, other, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("name", "params"), [c for c in CASES if "sampled" in get_divergence(c[0]).modes])
def test_single_sample_gives_the_gradient_of_the_loss(name: str, params: dict[str, float]):
    """Every token weighted by its probability under TRB's mu: the policy gradient is that of the full loss, exactly;
    without the weight q / mu it is not."""
    student, teacher = logits()
    weight = torch.ones(ROWS)
    _, expected = reference(oracle("full", name, params), student, teacher, weight)
    logq, logp = student.log_softmax(-1), teacher.log_softmax(-1)
    log_mu = blend(logq, logp, 0.2).log_mu.double()
    rule = get_divergence(name).rule("sampled", K, params)

    def gradient(behavior: Tensor) -> Tensor:
        each = Prefixes(logq.reshape(-1, 1), logp.reshape(-1, 1))
        advantage = sampled_advantage(rule, each, behavior.reshape(-1)).reshape(ROWS, SIZE)
        leaf = student.clone().requires_grad_()
        (-(log_mu.exp() * advantage) * leaf.log_softmax(-1)).sum().backward()
        return leaf.grad

    torch.testing.assert_close(gradient(log_mu), expected, rtol=1e-5, atol=1e-6)
    assert (gradient(logq) - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.25])
def test_exopd(scale: float):
    """Its single-sample gradient is that of KL to the extrapolated target; scale 1 is reverse KL."""
    student, teacher = logits()
    reference_logits = logits(seed=5)[0]
    leaf = student.clone().requires_grad_()
    rows = zip(leaf, teacher, reference_logits, strict=True)
    torch.stack([loss_oracles.exopd(s, t, r, scale) for s, t, r in rows]).sum().backward()
    logq, logp, logr = (z.log_softmax(-1).reshape(-1, 1) for z in (student, teacher, reference_logits))
    each = Prefixes(logq, logp, logp_reference_CV=logr)
    rule = get_divergence("exopd").rule("sampled", K, {"scale": scale})
    advantage = sampled_advantage(rule, each, logq.squeeze(-1)).reshape(ROWS, SIZE)
    other = student.clone().requires_grad_()
    (-(other.detach().softmax(-1) * advantage) * other.log_softmax(-1)).sum().backward()
    torch.testing.assert_close(other.grad, leaf.grad)


def test_sampled_gradient_over_sequences():
    """Every sequence of 2 tokens over 4, drawn from TRB's mu, enumerated: the expected policy gradient is
    that of the per-prefix reverse KL on the prefixes mu visits. Without the weight q / mu it is biased."""
    size = 4
    student, teacher = logits(1 + size, size, seed=3)  # row 0: the empty prefix; row 1 + a: after token a
    student.requires_grad_()
    logp_s, logp_t = student.log_softmax(-1), teacher.log_softmax(-1)
    log_mu = blend(logp_s.detach(), logp_t, 0.2).log_mu
    visits = torch.cat([torch.ones(1), log_mu[0].exp()]).double()
    exact = (visits * torch.stack([loss_oracles.reverse_kl(student[i], teacher[i], Row()) for i in range(5)])).sum()
    exact_grad = torch.autograd.grad(exact, student)[0]
    sequences = torch.tensor(list(itertools.product(range(size), repeat=2)))
    places = torch.stack([torch.zeros(len(sequences), dtype=torch.long), 1 + sequences[:, 0]], 1)
    s, t, m = (table[places, sequences].reshape(-1) for table in (logp_s, logp_t, log_mu))
    probability = m.reshape(-1, 2).sum(-1).exp().repeat_interleave(2)

    def gradient(behavior: Tensor) -> Tensor:
        advantage = sampled_advantage(divergences.reverse_kl, Prefixes(s[:, None], t[:, None]), behavior)
        assert not advantage.requires_grad
        return torch.autograd.grad(-(probability * advantage * s).sum(), student, retain_graph=True)[0]

    torch.testing.assert_close(gradient(m), exact_grad, rtol=1e-5, atol=1e-6)
    biased = gradient(s.detach())  # weight 1: as if the tokens had come from the student
    assert (biased - exact_grad).norm() > 0.1 * exact_grad.norm()


def test_a_loss_of_ones_own():
    """Ten lines: the squared Hellinger distance; and a name is taken once."""

    def hellinger(prefixes: Prefixes, *, weight: float = 1.0) -> Integrand:
        root_q, root_p = (prefixes.logp_student_CV / 2).exp(), (prefixes.logp_teacher_CV / 2).exp()
        return Integrand(weight * (root_q - root_p).square(), weight * root_q * (root_q - root_p))

    register_divergence("hellinger", weight=Parameter(0))(hellinger)
    try:
        student, teacher = logits()

        def by_definition(s: Tensor, t: Tensor, row: Row) -> Tensor:
            pairs = zip(loss_oracles.softmax(s), loss_oracles.softmax(t), strict=True)
            return sum((2 * (a**0.5 - b**0.5) ** 2 for a, b in pairs), torch.zeros((), dtype=torch.float64))

        expected, gradient = reference(by_definition, student, teacher, torch.ones(ROWS))
        loss = compute("full", "hellinger", {"weight": 2.0}, student.requires_grad_(), teacher)
        loss.sum().backward()
        torch.testing.assert_close((loss.detach(), student.grad), (expected, gradient))
        with pytest.raises(ValueError, match="registered already"):
            register_divergence("hellinger")(hellinger)
    finally:
        del divergences._DIVERGENCES["hellinger"]


def test_a_file_of_ones_own(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from verl_trb.divergences import Integrand, register_divergence\n"
        "@register_divergence('twice')\n"
        "def twice(prefixes):\n"
        "    column = 2 * prefixes.student_CV * (prefixes.logp_student_CV - prefixes.logp_teacher_CV)\n"
        "    return Integrand(column, column)\n"
    )
    try:
        student, teacher = logits()
        loss = compute("full", f"{file}:twice", {}, student, teacher)
        torch.testing.assert_close(loss, 2 * compute("full", "reverse_kl", {}, student, teacher))
    finally:
        del divergences._DIVERGENCES["twice"]
    with pytest.raises(ValueError, match="none.py cannot be run: FileNotFoundError"):
        get_divergence(f"{tmp_path}/none.py:mine")


def test_registry_refuses():
    with pytest.raises(ValueError, match="no divergence 'foward_kl'; did you mean 'forward_kl'"):
        get_divergence("foward_kl")
    with pytest.raises(ValueError, match="there are cross_entropy, eopd"):
        get_divergence("zzzz")
    with pytest.raises(ValueError, match="forward_kl is not defined for loss=sampled, only for full, topk"):
        get_divergence("forward_kl").rule("sampled", K, {})
