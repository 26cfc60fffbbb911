"""The chunked machinery, on reverse KL and its top-k form, against naive float64 references."""

from __future__ import annotations

import math
from functools import partial

import oracles
import pytest
import torch

from verl_trb import chunked_loss
from verl_trb.chunked_loss import loss_from_layers, loss_from_logits
from verl_trb.divergences import reverse_kl, topk_reverse_kl
from verl_trb.vocabulary import canonicalize, share_vocabulary

INF = math.inf


pytestmark = pytest.mark.usefixtures("gradient")  # both ways through the output layers, for every test


def logits(rows=7, size=13, scale=2.0, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(rows, size, generator=g, dtype=torch.float64)).to(dtype) for _ in range(2)]


def form(topk):
    """Reverse KL, or the paper's top-k form of it."""
    return reverse_kl if topk is None else partial(topk_reverse_kl, k=topk)


def reference(loss_of_row, student, teacher, weight):
    """Loss of each row and the gradient of sum(weight * loss), row by row in float64."""
    leaf = student.double().detach().clone().requires_grad_()
    loss = torch.stack([loss_of_row(leaf[i], teacher[i].double()) for i in range(len(leaf))])
    (loss * weight.double()).sum().backward()
    return loss.detach(), leaf.grad


def shared(size=13, student_eos=4, teacher_eos=9, student_rows=13, teacher_rows=13):
    ids = {f"t{i}": i for i in range(size)}
    return share_vocabulary(
        ids,
        ids,
        student_eos=student_eos,
        teacher_eos=teacher_eos,
        student_rows=student_rows,
        teacher_rows=teacher_rows,
        spare_ids=[0],
    )


LOSSES = [
    (None, oracles.reverse_kl),
    *((k, lambda s, t, k=k: oracles.topk_loss(s, t, k)) for k in (1, 4, 13)),
]
PRECISION = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 1e-3},
}


@pytest.mark.parametrize("dtype", list(PRECISION))
@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
@pytest.mark.parametrize(("topk", "oracle"), LOSSES)
def test_value_and_gradient_from_logits(topk, oracle, chunk_tokens, dtype):
    """For any weighting of the tokens; the gradient has the logits' dtype, the loss is float32 at least."""
    student, teacher = logits(dtype=dtype)
    weight = torch.linspace(-1, 2, len(student))
    expected, expected_grad = reference(oracle, student, teacher, weight)
    student.requires_grad_()
    out = loss_from_logits(student, teacher, divergence=form(topk), chunk_tokens=chunk_tokens)
    (out.loss_N * weight).sum().backward()
    value = PRECISION[torch.float64 if dtype == torch.float64 else torch.float32]
    torch.testing.assert_close(out.loss_N.double(), expected, **value)
    torch.testing.assert_close(student.grad.double(), expected_grad, **PRECISION[dtype])
    assert student.grad.dtype == dtype and out.loss_N.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("dtype", list(PRECISION))
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("topk", "oracle"), LOSSES[:3])
def test_value_and_gradient_through_output_layers(topk, oracle, bias, dtype):
    """Hidden sizes differ, the temperature is not 1, 7 tokens in chunks of 3."""
    g = torch.Generator().manual_seed(0)
    shapes = {
        "hidden": (7, 5),
        "weight": (13, 5),
        "hidden_t": (7, 8),
        "weight_t": (13, 8),
        "b": (13,),
        "b_t": (13,),
    }
    x = {name: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}
    weight = torch.linspace(-1, 2, 7, dtype=torch.float64)
    leaves = {name: x[name].clone().requires_grad_() for name in ("hidden", "weight", "b")}
    exact = {name: x[name].double().requires_grad_() for name in ("hidden", "weight", "b")}
    temperature = 0.7
    z_s = (exact["hidden"] @ exact["weight"].T + bias * exact["b"]) / temperature
    z_t = (x["hidden_t"].double() @ x["weight_t"].double().T + bias * x["b_t"].double()) / temperature
    expected = torch.stack([oracle(z_s[i], z_t[i]) for i in range(7)])
    (expected * weight).sum().backward()

    out = loss_from_layers(
        leaves["hidden"],
        leaves["weight"],
        x["hidden_t"].requires_grad_(),
        x["weight_t"].requires_grad_(),
        bias_student_V=leaves["b"] if bias else None,
        bias_teacher_V=x["b_t"] if bias else None,
        temperature=temperature,
        divergence=form(topk),
        chunk_tokens=3,
    )
    (out.loss_N * weight).sum().backward()
    close = PRECISION[dtype] if dtype != torch.bfloat16 else {"rtol": 5e-2, "atol": 0.15}  # bfloat16 products
    torch.testing.assert_close(out.loss_N.double(), expected.detach(), **close)
    for name in ("hidden", "weight", "b") if bias else ("hidden", "weight"):
        assert leaves[name].grad.dtype == dtype
        torch.testing.assert_close(leaves[name].grad.double(), exact[name].grad, **close)
    assert x["hidden_t"].grad is None and x["weight_t"].grad is None


@pytest.mark.parametrize("topk", [None, 4])
@pytest.mark.parametrize("use", ["loss", "logp", "both"])
def test_rollout_tokens_through_output_layers(use, topk):
    """Log-probabilities of given tokens next to the loss: values, and gradients of mixtures."""
    vocabulary = shared(11, 4, 9, 13, 12)
    g = torch.Generator().manual_seed(0)
    hidden, weight, hidden_t, weight_t = (
        torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((7, 5), (13, 5), (7, 4), (12, 4))
    )
    tokens = torch.tensor([0, 1, 4, 4, 6, 8, 10])
    scale_loss = torch.linspace(-1, 2, 7).double() * (use != "logp")
    scale_logp = torch.linspace(3, -2, 7).double() * (use != "loss")
    exact = [x.clone().requires_grad_() for x in (hidden, weight)]
    z_s = canonicalize(exact[0] @ exact[1].T / 0.7, vocabulary, "student")
    z_t = canonicalize(hidden_t @ weight_t.T / 0.7, vocabulary, "teacher")
    oracle = oracles.reverse_kl if topk is None else lambda s, t: oracles.topk_loss(s, t, topk)
    loss = torch.stack([oracle(z_s[i], z_t[i]) for i in range(7)])
    logp, logp_t = (z.log_softmax(-1)[range(7), tokens] for z in (z_s, z_t))
    (loss * scale_loss + logp * scale_logp).sum().backward()

    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    how = {"temperature": 0.7, "divergence": form(topk), "vocabulary": vocabulary, "chunk_tokens": 3, "token_N": tokens}
    out = loss_from_layers(*leaves, hidden_t, weight_t, **how)
    torch.testing.assert_close(out.loss_N, loss)
    torch.testing.assert_close(out.logp_student_N, logp)
    torch.testing.assert_close(out.logp_teacher_N, logp_t)
    torch.testing.assert_close(out.reverse_kl_N[0], oracles.reverse_kl(z_s[0], z_t[0]))
    assert not out.logp_teacher_N.requires_grad
    (out.loss_N * scale_loss + out.logp_student_N * scale_logp).sum().backward()
    for leaf, expected in zip(leaves, exact, strict=True):
        torch.testing.assert_close(leaf.grad, expected.grad)


@pytest.mark.parametrize("use", ["loss", "loss and logp", "loss and 0 times logp"])
def test_what_backward_computes_again(gradient, use):
    """Nothing where the loss alone is differentiated and its gradient was kept."""
    calls = []

    def counted(prefixes):
        calls.append(len(prefixes.logp_student_CV))
        return reverse_kl(prefixes)

    layers = [torch.randn(*shape, requires_grad=True) for shape in ((7, 5), (13, 5), (7, 4), (13, 4))]
    out = loss_from_layers(*layers, divergence=counted, chunk_tokens=3, token_N=torch.zeros(7, dtype=torch.long))
    factor = {"loss": None, "loss and logp": 1.0, "loss and 0 times logp": 0.0}[use]
    total = out.loss_N.sum() if factor is None else (out.loss_N + factor * out.logp_student_N).sum()
    assert calls == [3, 3, 1]
    total.backward()
    again = "again" in gradient or use == "loss and logp"
    assert calls == [3, 3, 1] * (2 if again else 1)


def test_frozen_parts_get_no_gradient():
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3)
    loss_from_layers(hidden, weight, torch.randn(4, 2), torch.randn(6, 2)).loss_N.sum().backward()
    assert hidden.grad is not None and weight.grad is None
    student, teacher = logits(dtype=torch.float32)
    with torch.no_grad():
        assert not loss_from_logits(student.requires_grad_(), teacher).loss_N.requires_grad


@pytest.mark.parametrize("topk", [None, 4])
def test_statistics(topk):
    """Exact KL and both entropies come with either loss, without gradient."""
    student, teacher = logits()
    out = loss_from_logits(student.requires_grad_(), teacher, divergence=form(topk), chunk_tokens=2)
    for i in range(len(student)):
        p, q = oracles.probabilities(student[i].detach()), oracles.probabilities(teacher[i])
        assert float(out.reverse_kl_N[i]) == pytest.approx(oracles.kl(p, q), rel=1e-9)
        assert float(out.student_entropy_N[i]) == pytest.approx(-sum(p * [math.log(a) for a in p]), rel=1e-9)
        assert float(out.teacher_entropy_N[i]) == pytest.approx(-sum(q * [math.log(a) for a in q]), rel=1e-9)
    assert not out.reverse_kl_N.requires_grad and not out.teacher_entropy_N.requires_grad


def test_topk_gradient_is_not_that_of_the_truncated_sum():
    """The values agree; the truncated sum, differentiated, pulls elsewhere. With k = V the two are one."""
    student, teacher = logits()
    for k, same in ((4, False), (13, True)):
        leaf = student.clone().requires_grad_()
        out = loss_from_logits(leaf, teacher, divergence=form(k))
        out.loss_N.sum().backward()
        one = torch.ones(len(student))
        value, grad = reference(lambda s, t, k=k: oracles.truncated_kl(s, t, k), student, teacher, one)
        torch.testing.assert_close(out.loss_N.detach(), value)
        assert torch.allclose(leaf.grad, grad, atol=1e-6) == same
        if not same:
            assert (leaf.grad - grad).norm() > 0.1 * grad.norm()


@pytest.mark.parametrize("topk", [None, 5])
def test_masked_tokens_contribute_nothing(topk):
    """-inf in both models: the same loss and gradient as without those columns; even for k beyond them."""
    student, teacher = logits()
    gone = [1, 5, 12, 2, 3, 4, 6, 7, 8]
    left = [i for i in range(13) if i not in gone]
    small_student = student[:, left].clone().requires_grad_()
    small = loss_from_logits(small_student, teacher[:, left], divergence=form(topk))
    small.loss_N.sum().backward()
    student[:, gone], teacher[:, gone] = -INF, -INF
    out = loss_from_logits(student.requires_grad_(), teacher, divergence=form(topk))
    out.loss_N.sum().backward()
    for a, b in zip(out, small, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(student.grad[:, left], small_student.grad)
    assert not student.grad[:, gone].any()


@pytest.mark.parametrize("topk", [None, 4])
def test_student_mass_where_the_teacher_has_none_costs_infinity(topk):
    student, teacher = logits()
    teacher[2, student[2].argmax()] = -INF
    out = loss_from_logits(student.requires_grad_(), teacher, divergence=form(topk))
    assert out.loss_N[2] == INF and out.loss_N[[0, 1, 3]].isfinite().all()
    # A token the loss is not averaged over (weight 0) must not poison the others.
    (out.loss_N * torch.tensor([1.0, 1, 0, 1, 1, 1, 1])).nan_to_num().sum().backward()
    assert student.grad.isfinite().all() and not student.grad[2].any()


def test_identical_models_cost_nothing():
    student, _ = logits(scale=8.0, dtype=torch.float32)
    for topk in (None, 4):
        leaf = student.clone().requires_grad_()
        out = loss_from_logits(leaf, student.clone(), divergence=form(topk))
        out.loss_N.sum().backward()
        assert not out.loss_N.any() and not leaf.grad.any()


@pytest.mark.parametrize("topk", [None, 4])
@pytest.mark.parametrize(("student_eos", "teacher_eos"), [(4, 9), (9, 4), (4, 4)])
def test_shared_vocabulary_in_both_paths(student_eos, teacher_eos, topk):
    """Padded rows and two EOS: as if canonicalized before; padding rows get no gradient."""
    vocabulary = shared(11, student_eos, teacher_eos, 13, 16)
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 5, generator=g).double(), torch.randn(13, 5, generator=g).double()
    hidden_t, weight_t = torch.randn(6, 4, generator=g).double(), torch.randn(16, 4, generator=g).double()
    weight.requires_grad_()
    student, teacher = hidden @ weight.T, hidden_t @ weight_t.T
    student.retain_grad()
    both = [canonicalize(z, vocabulary, role) for z, role in ((student, "student"), (teacher, "teacher"))]
    expected = loss_from_logits(*both, divergence=form(topk)).loss_N
    from_logits = loss_from_logits(student, teacher, divergence=form(topk), vocabulary=vocabulary, chunk_tokens=4)
    from_function = loss_from_logits(student, lambda rows: teacher[rows], divergence=form(topk), vocabulary=vocabulary)
    linear = loss_from_layers(
        hidden, weight, hidden_t, weight_t, divergence=form(topk), vocabulary=vocabulary, chunk_tokens=4
    )
    grads = []
    for loss in (expected, from_logits.loss_N, from_function.loss_N, linear.loss_N):
        torch.testing.assert_close(loss, expected)
        grads.append(torch.autograd.grad(loss.sum(), weight, retain_graph=True)[0])
        torch.testing.assert_close(grads[-1], grads[0])
    assert grads[0].any() and not grads[0][11:].any()
    assert all(not grads[0][i].any() for i in vocabulary.masked)


def test_second_backward_is_refused():
    student, teacher = logits()
    loss = loss_from_logits(student.requires_grad_(), teacher).loss_N.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the largest float32 tensor any operation makes."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // 4)
        return out


def test_no_large_float32_tensor():
    """Forward and backward of N = 64 tokens in chunks of 4, V = 1000: the largest is a chunk, not N x V."""
    student, teacher = logits(64, 1000, dtype=torch.bfloat16)
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 4, generator=g).bfloat16(), torch.randn(1000, 4, generator=g).bfloat16()
    hidden.requires_grad_(), weight.requires_grad_(), student.requires_grad_()
    chunked_loss._SCRATCH.buffers.clear()  # of larger chunks before
    with Largest() as largest:
        loss_from_logits(student, teacher, chunk_tokens=4).loss_N.mean().backward()
        loss_from_layers(hidden, weight, hidden.detach(), -weight.detach(), chunk_tokens=4).loss_N.mean().backward()
    assert 0 < largest.numbers <= 4 * 1000
    with Largest() as largest:  # the instrument sees a larger chunk
        loss_from_logits(student, teacher, chunk_tokens=8)
    assert largest.numbers == 8 * 1000


def test_qwen_sized_vocabulary_in_float32():
    """V = 151,936 in float32 against the float64 sum: value and gradient."""
    student, teacher = logits(2, 151_936, dtype=torch.float32)
    out = loss_from_logits(student.requires_grad_(), teacher, chunk_tokens=1)
    out.loss_N.sum().backward()
    logp, logq = student.detach().double().log_softmax(-1), teacher.double().log_softmax(-1)
    kl = (logp.exp() * (logp - logq)).sum(-1)
    torch.testing.assert_close(out.loss_N.double(), kl, rtol=1e-5, atol=0)
    expected = logp.exp() * (logp - logq - kl[:, None])
    assert (student.grad - expected).abs().sum() < 1e-4 * expected.abs().sum()


def test_no_tokens_at_all():
    out = loss_from_logits(torch.zeros(0, 5, requires_grad=True), torch.zeros(0, 5))
    out.loss_N.sum().backward()
    assert out.loss_N.shape == (0,)


def test_wrong_input():
    student, teacher = logits()
    hidden, weight = torch.zeros(7, 3), torch.zeros(13, 3)
    for words, call in (
        ("chunk_tokens", lambda: loss_from_logits(student, teacher, chunk_tokens=0)),
        ("7 tokens", lambda: loss_from_logits(student, teacher[:3])),
        ("shape", lambda: loss_from_logits(student, teacher[:, :5])),
        ("logits must be", lambda: loss_from_logits(student[None], lambda rows: teacher)),
        ("temperature", lambda: loss_from_layers(hidden, weight, hidden, weight, temperature=0.0)),
        ("7 and 6 tokens", lambda: loss_from_layers(hidden, weight, hidden[:6], weight)),
    ):
        with pytest.raises(ValueError, match=words):
            call()
