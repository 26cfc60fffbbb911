"""What verification keeps of the teacher makes the same loss as reading the teacher again, and survives its packing."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from torch import Tensor

from verl_trb.chunked_loss import loss_from_layers
from verl_trb.divergences import get_divergence
from verl_trb.rollout.kept import Kept
from verl_trb.verified import Verified, as_bytes, byte_rows, from_bytes, loss_from_verified, verified
from verl_trb.vocabulary import SharedVocabulary

pytestmark = pytest.mark.usefixtures("gradient")

TOKENS, SIZE, WIDTH, K = 11, 17, 6, 4
VOCABULARY = SharedVocabulary(size=15, student_eos=3, teacher_eos=7, masked=(0, 7), marker=0)


class World:
    """Layers of both models in float64, and both distributions at a temperature by plain softmax."""

    def __init__(self, temperature: float) -> None:
        g = torch.Generator().manual_seed(1)
        self.hidden_ND, self.teacher_ND = (torch.randn(TOKENS, WIDTH, generator=g).double() for _ in range(2))
        self.weight_VD, self.weight_teacher_VD = (torch.randn(SIZE, WIDTH, generator=g).double() for _ in range(2))
        self.token_N = torch.tensor([1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12])
        self.temperature = temperature
        self.logp_student_NV = self.logprobs(self.hidden_ND @ self.weight_VD.T)
        teacher_NV = self.teacher_ND @ self.weight_teacher_VD.T / temperature
        own, other = VOCABULARY.student_eos, VOCABULARY.teacher_eos
        teacher_NV[:, own] = torch.stack([teacher_NV[:, own], teacher_NV[:, other]]).logsumexp(0)
        self.logp_teacher_NV = self.logprobs(teacher_NV * temperature)

    def logprobs(self, logits_NV: Tensor) -> Tensor:
        live_NV = logits_NV[:, : VOCABULARY.size] / self.temperature
        live_NV[:, list(VOCABULARY.masked)] = -math.inf
        return live_NV.log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_tokens", [3, 1024])
def test_loss_is_that_of_reading_the_teacher(temperature: float, chunk_tokens: int) -> None:
    world = World(temperature)
    known = verified(world.logp_student_NV, world.logp_teacher_NV, world.token_N, K)
    results = []
    for reuse in (True, False):
        hidden_ND, weight_VD = world.hidden_ND.clone().requires_grad_(), world.weight_VD.clone().requires_grad_()
        shared = {"temperature": temperature, "vocabulary": VOCABULARY, "token_N": world.token_N}
        if reuse:
            losses = loss_from_verified(hidden_ND, weight_VD, known, chunk_tokens=chunk_tokens, **shared)
        else:
            rule = get_divergence("reverse_kl").rule("topk", K, {})
            teacher = world.teacher_ND, world.weight_teacher_VD
            losses = loss_from_layers(hidden_ND, weight_VD, *teacher, divergence=rule, **shared)
        scale_N = torch.linspace(0, 2, TOKENS).double()
        (losses.loss_N * scale_N + losses.logp_student_N * scale_N.flip(0)).sum().backward()
        results.append([*losses, hidden_ND.grad, weight_VD.grad])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_loss_is_the_oracles() -> None:
    world = World(1.0)
    known = verified(world.logp_student_NV, world.logp_teacher_NV, world.token_N, K)
    losses = loss_from_verified(world.hidden_ND, world.weight_VD, known, vocabulary=VOCABULARY, token_N=world.token_N)
    live = [token for token in range(VOCABULARY.size) if token not in VOCABULARY.masked]
    pairs = list(zip(world.logp_student_NV[:, live], world.logp_teacher_NV[:, live], strict=True))
    expected_N = torch.stack([oracles.topk_loss(s, t, K) for s, t in pairs])
    torch.testing.assert_close(losses.loss_N, expected_N, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(losses.reverse_kl_N, torch.stack([oracles.reverse_kl(s, t) for s, t in pairs]))


def test_packing_keeps_large_ids_exact() -> None:
    size = 151_936
    g = torch.Generator().manual_seed(0)
    logp_student_NV, logp_teacher_NV = (torch.randn(3, size, generator=g).log_softmax(-1) for _ in range(2))
    known = verified(logp_student_NV, logp_teacher_NV, torch.tensor([0, 150_001, size - 1]), k=16)
    assert known.packed().shape == (3, 35) and known.packed().dtype == torch.float32
    for one, other in zip(Verified.unpacked(known.packed()), known, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 5])
def test_rows_survive_the_way_to_the_trainer(dtype: torch.dtype, tokens: int) -> None:
    rows_TC = torch.randn(tokens, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    arrived_TC = from_bytes(*byte_rows(*as_bytes(rows_TC)))
    assert arrived_TC.dtype == dtype and torch.equal(arrived_TC, rows_TC)


def test_impossible_tokens_cost_nothing() -> None:
    """k beyond what the student can emit: tokens of probability 0 in both models are among the k."""
    logp_NV = torch.tensor([[0.6, 0.4, 0.0, 0.0]]).log()
    known = verified(logp_NV, torch.tensor([[0.3, 0.7, 0.0, 0.0]]).log(), torch.tensor([0]), k=4)
    losses = loss_from_verified(torch.eye(1), logp_NV.T.contiguous(), known, token_N=torch.tensor([0]))
    expected = 0.6 * math.log(0.6 / 0.3) + 0.4 * math.log(0.4 / 0.7)
    assert float(losses.loss_N) == pytest.approx(expected, abs=1e-6)


def test_kept_tokens_are_those_of_the_rollout() -> None:
    kept = Kept()
    columns_RGC = torch.arange(12.0).reshape(2, 3, 2)
    kept.add(["a", None], torch.tensor([[True, True, False], [True, True, True]]), columns_RGC)
    kept.add(["b", "a"], torch.tensor([[False, False, False], [True, False, False]]), columns_RGC)
    assert kept.take("a").tolist() == [[0, 1], [2, 3], [6, 7]]
    assert len(kept.take("b")) == 0 and kept.take("a") is None
