"""Accept, correct, cut: the tokens that come out follow mu, whatever the student drafted."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import torch

from verl_trb import coupling
from verl_trb.coupling import couple, draw, mark_corrections
from verl_trb.trust_region import blend

ALPHA = 1e-4  # a correct coupling fails each chi-square test with this probability; the seeds are fixed
V = 6


@pytest.fixture(params=["rejected", "all"], autouse=True)
def rows_to_correct(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test with corrections for the rows with a rejection, as on a CPU, and for all rows, as on a GPU."""
    if request.param == "all":
        monkeypatch.setattr(coupling, "_rows_to_correct", lambda corrected_BG: torch.arange(len(corrected_BG)))


def walk(seed=0, epsilon=0.1):
    """First-order models over V tokens: log-probabilities [V, V] given the previous token, and mu of each."""
    g = torch.Generator().manual_seed(seed)
    logp_student = (1.5 * torch.randn(V, V, generator=g)).log_softmax(-1)
    logp_teacher = (1.5 * torch.randn(V, V, generator=g)).log_softmax(-1)
    return logp_student, blend(logp_student, logp_teacher, epsilon).log_mu


def roll(rows, length, logp_student, log_mu, seed, start=0):
    """Drafts of the student's own chain, and what the coupling makes of them."""
    g = torch.Generator().manual_seed(seed)
    previous = torch.full((rows,), start)
    drafts, p_student, p_mu = [], [], []
    for _ in range(length):
        p_student.append(logp_student[previous])
        p_mu.append(log_mu[previous])
        previous = torch.multinomial(logp_student[previous].exp(), 1, generator=g).squeeze(-1)
        drafts.append(previous)
    draft = torch.stack(drafts, 1)
    args = draft, torch.full((rows,), length), torch.stack(p_student, 1), torch.stack(p_mu, 1)
    return draft, couple(*args, generator=g)


def counts(tokens):
    return np.bincount(tokens.numpy(), minlength=V).astype(float)


def test_tokens_follow_mu_at_every_position():
    """chi-square against mu at position 1, at 2 and 3 given the token before; fails for pi_S."""
    logp_student, log_mu = walk()
    _, out = roll(60_000, 3, logp_student, log_mu, seed=1)
    first = counts(out.tokens_BG[:, 0])
    assert oracles.chi_square(first, oracles.probabilities(log_mu[0])) > ALPHA
    assert oracles.chi_square(first, oracles.probabilities(logp_student[0])) < 1e-12
    powerful = 0
    for position in (1, 2):
        for before in range(V):
            here = (out.num_tokens_B > position) & (out.tokens_BG[:, position - 1] == before)
            seen = counts(out.tokens_BG[here, position])
            assert oracles.chi_square(seen, oracles.probabilities(log_mu[before])) > ALPHA
            powerful += oracles.chi_square(seen, oracles.probabilities(logp_student[before])) < 1e-6
    assert powerful >= 8  # of 12: rare predecessors have few samples


def test_restarted_blocks_make_an_exact_chain():
    """Blocks of 2 continued at the cut give 3 tokens from the joint law of mu (all V^3 sequences)."""
    logp_student, log_mu = walk(seed=3)
    rows, g = 40_000, torch.Generator().manual_seed(2)
    sequence = torch.zeros(rows, 4, dtype=torch.long)  # column 0 is the start token
    done = torch.zeros(rows, dtype=torch.long)
    while (done < 3).any():
        first = sequence.gather(1, done[:, None]).squeeze(1)
        d1 = torch.multinomial(logp_student[first].exp(), 1, generator=g).squeeze(-1)
        d2 = torch.multinomial(logp_student[d1].exp(), 1, generator=g).squeeze(-1)
        models = [torch.stack([table[first], table[d1]], 1) for table in (logp_student, log_mu)]
        out = couple(torch.stack([d1, d2], 1), (3 - done).clamp(max=2), *models, generator=g)
        for position in range(2):
            row = (out.num_tokens_B > position).nonzero().squeeze(-1)
            sequence[row, done[row] + 1 + position] = out.tokens_BG[row, position]
        done += out.num_tokens_B
    codes = (sequence[:, 1] * V + sequence[:, 2]) * V + sequence[:, 3]
    seen = np.bincount(codes.numpy(), minlength=V**3).astype(float)

    def joint(table):
        p = np.exp(table.double().numpy())
        p /= p.sum(-1, keepdims=True)
        return (p[0][:, None, None] * p[:, :, None] * p[None]).reshape(-1)

    assert oracles.chi_square(seen, joint(log_mu)) > ALPHA
    assert oracles.chi_square(seen, joint(logp_student)) < 1e-12


def test_tokens_that_the_student_never_drafts_come_as_corrections():
    """A policy may leave the student's support (the teacher's rollouts do): pi_S = 0 at half of mu's mass."""
    student = torch.tensor([0.6, 0.3, 0.1, 0.0, 0.0, 0.0]).log()
    mu = torch.tensor([0.1, 0.3, 0.1, 0.3, 0.2, 0.0]).log()
    _, out = roll(60_000, 2, student.expand(V, V), mu.expand(V, V), seed=4)
    for position in range(2):
        seen = out.tokens_BG[out.num_tokens_B > position, position]
        assert oracles.chi_square(counts(seen), oracles.probabilities(mu)) > ALPHA
        assert not out.accepted_BG[out.tokens_BG[:, position] >= 3, position].any()
    assert torch.equal(out.logp_BG[:, 0], mu[out.tokens_BG[:, 0]])


def test_acceptance_is_one_minus_total_variation():
    """Within 4 standard errors (a correct coupling fails with probability 6e-5)."""
    logp_student, log_mu = walk(epsilon=0.3)
    rows = 50_000
    _, out = roll(rows, 1, logp_student, log_mu, seed=4)
    rate = float(out.accepted_BG.double().mean())
    expected = float(torch.minimum(logp_student[0].exp(), log_mu[0].exp()).sum())
    assert 0.5 < expected < 0.9
    assert abs(rate - expected) < 4 * math.sqrt(expected * (1 - expected) / rows)
    assert 1 - expected <= math.sqrt(0.3 / 2)  # Pinsker, as the paper states it


def test_equal_distributions_accept_every_draft():
    """Also the draft decided by the largest number below 1, and a token of probability 1e-30."""
    logp = torch.randn(500, 4, 50).mul(20).log_softmax(-1)
    draft = torch.randint(0, 50, (500, 4))
    uniform = torch.full((500, 4), 1 - 2**-24)
    out = couple(draft, torch.full((500,), 4), logp, logp.clone(), uniform_BG=uniform)
    assert torch.equal(out.tokens_BG, draft) and out.accepted_BG.all() and (out.num_tokens_B == 4).all()
    torch.testing.assert_close(out.logp_BG, logp.gather(-1, draft[..., None]).squeeze(-1), rtol=0, atol=0)


def test_shape_of_a_block():
    """Padding, empty rows, the cut, log mu of what is emitted, and no bonus token; mu excludes token 0."""
    student = torch.full((4, 3, 4), 0.25).log()
    mu = torch.tensor([0.0, 0.5, 0.25, 0.25]).log().expand(4, 3, 4).contiguous()
    draft = torch.tensor([[1, 2, 3], [2, 0, 1], [0, -1, -1], [-1, -1, -1]])
    number = torch.tensor([3, 3, 1, 0])
    out = couple(draft, number, student, mu, generator=torch.Generator().manual_seed(0))
    # Only token 1 has more mass in mu than in the student, so it is what any rejection becomes.
    assert out.tokens_BG.tolist() == [[1, 2, 3], [2, 1, -1], [1, -1, -1], [-1, -1, -1]]
    assert out.num_tokens_B.tolist() == [3, 2, 1, 0]
    assert out.accepted_BG.tolist() == [[True] * 3, [True, False, False], [False] * 3, [False] * 3]
    half, quarter = math.log(0.5), math.log(0.25)
    expected = [[half, quarter, quarter], [quarter, half, 0], [half, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(out.logp_BG, torch.tensor(expected))
    assert out.tokens_BG.dtype == torch.int64 and out.logp_BG.dtype == torch.float32


def test_given_uniforms_decide():
    """Token 0 has mu / pi_S = 0.5: accepted just under, rejected above. With mu = 0, even u = 0 rejects."""
    student, mu = torch.tensor([[[0.8, 0.2]]]).log(), torch.tensor([[[0.4, 0.6]]]).log()
    args = torch.tensor([[0]]), torch.tensor([1]), student, mu
    for u, token in ((0.49, 0), (0.51, 1), (0.0, 0)):
        assert couple(*args, uniform_BG=torch.tensor([[u]])).tokens_BG.item() == token
    never = torch.tensor([[[0.0, 1.0]]]).log()
    assert couple(*args[:3], never, uniform_BG=torch.zeros(1, 1)).tokens_BG.item() == 1


def test_padding_may_hold_anything():
    logp_student, log_mu = walk()
    rows = 200
    draft = torch.multinomial(logp_student[0].exp().expand(rows, V), 2, replacement=True)
    models = [table[0].expand(rows, 2, V).clone() for table in (logp_student, log_mu)]
    uniform = torch.rand(rows, 2)
    number = torch.ones(rows, dtype=torch.long)
    clean = couple(draft, number, *models, uniform_BG=uniform, generator=torch.Generator().manual_seed(0))
    for model in models:
        model[:, 1] = math.nan
    draft[:100, 1], draft[100:, 1] = -7, 10**9
    dirty = couple(draft, number, *models, uniform_BG=uniform, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_rejection_without_residual_draws_from_mu(noise):
    """A draft the student could not have drawn (an engine's junk) or equal distributions up to rounding: the
    residual is empty, and the token comes from mu, never from outside its support."""
    p = torch.tensor([0.0, 0.3, 0.7, 0.0])
    student = p.log().expand(20_000, 1, 4)
    mu = (p * (1 - noise)).log().expand(20_000, 1, 4)
    draft = torch.zeros(20_000, 1, dtype=torch.long)
    out = couple(draft, torch.ones(20_000, dtype=torch.long), student, mu, generator=torch.Generator().manual_seed(0))
    assert not out.accepted_BG.any() and (out.num_tokens_B == 1).all()
    seen = np.bincount(out.tokens_BG[:, 0].numpy(), minlength=4).astype(float)
    assert oracles.chi_square(seen, p.double().numpy()) > ALPHA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_corrections_never_leave_the_support_of_mu(dtype):
    g = torch.Generator().manual_seed(0)
    student = torch.randn(2000, 3, 30, generator=g).mul(3).log_softmax(-1)
    teacher = (
        torch.randn(2000, 3, 30, generator=g).mul(3).masked_fill(torch.rand(2000, 3, 30, generator=g) < 0.3, -math.inf)
    )
    mu = blend(student, teacher.log_softmax(-1), 3.0).log_mu.to(dtype)
    draft = torch.multinomial(student.exp().view(-1, 30), 1, generator=g).view(2000, 3)
    out = couple(draft, torch.randint(0, 4, (2000,), generator=g), student.to(dtype), mu, generator=g)
    emitted = out.tokens_BG >= 0
    assert 0.05 < float((~out.accepted_BG[emitted]).double().mean()) < 0.95
    assert (out.logp_BG[emitted] > -math.inf).all()
    assert torch.equal(emitted, torch.arange(3) < out.num_tokens_B[:, None])
    assert not (out.accepted_BG & ~emitted).any()


def test_full_size_vocabulary():
    """V = 151,936: a correction is drawn from the few tokens mu adds to."""
    size, rows = 151_936, 8
    student = torch.zeros(rows, 2, size).log_softmax(-1)
    mu = torch.zeros(rows, 2, size)
    mu[..., :3] = 12.0
    out = couple(
        torch.full((rows, 2), 500),
        torch.full((rows,), 2),
        student,
        mu.log_softmax(-1),
        uniform_BG=torch.full((rows, 2), 0.999),
    )
    assert (out.tokens_BG[:, 0] < 3).all() and (out.num_tokens_B == 1).all()


def test_empty_batches():
    for rows, length in ((0, 3), (3, 0), (0, 0)):
        models = torch.zeros(rows, length, 5), torch.zeros(rows, length, 5)
        out = couple(torch.zeros(rows, length, dtype=torch.long), torch.zeros(rows, dtype=torch.long), *models)
        assert out.tokens_BG.shape == (rows, length) and out.num_tokens_B.tolist() == [0] * rows


def test_shapes_that_do_not_fit_are_refused():
    draft, number, logp = (
        torch.zeros(2, 3, dtype=torch.long),
        torch.zeros(2, dtype=torch.long),
        torch.zeros(2, 3, 5),
    )
    for wrong in (
        (draft, number, logp, logp[..., :4]),
        (draft[:, :2], number, logp, logp),
        (draft, number[:1], logp, logp),
        (draft[0], number, logp[0], logp[0]),
    ):
        with pytest.raises(ValueError, match="must"):
            couple(*wrong)


def test_the_mark_of_a_correction_is_its_sign():
    logp = torch.tensor([-0.5, -2.0, 0.0, 0.0, 1e-8, 1e-8, -90.0])
    corrected = torch.tensor([True, False, True, False, True, False, True])
    marked = mark_corrections(logp, corrected)
    assert torch.equal(marked > 0, corrected)
    torch.testing.assert_close(-marked.abs(), logp.clamp(max=0), rtol=0, atol=1e-30)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 37.0])
def test_draws_are_in_proportion_to_the_weights(scale: float) -> None:
    """χ² of 200,000 draws at 9 degrees of freedom, beyond 45 with probability 1e-6; weights of 0 are never drawn."""
    weight_V = torch.tensor([0.0, 3.0, 0.0, 1.0, 0.5, 7.0, 2.0, 2.0, 4.0, 1.5, 0.1, 9.0, 0.0])
    count = 200_000
    token_B = draw((scale * weight_V).expand(count, -1), torch.Generator().manual_seed(0))
    drawn_V = token_B.bincount(minlength=len(weight_V)).double()
    expected_V = count * (weight_V / weight_V.sum()).double()
    assert (drawn_V[weight_V == 0] == 0).all()
    some_V = weight_V > 0
    assert float(((drawn_V - expected_V)[some_V] ** 2 / expected_V[some_V]).sum()) < 45


@pytest.mark.parametrize("size", [2048, 2048 + 37])
def test_draws_of_a_large_vocabulary_are_in_proportion_to_the_weights(size: int) -> None:
    """The same where a chunk is drawn first: at its edges, in one with a single token, and in the last, shorter one."""
    weight_V = torch.zeros(size)
    weight_V[[0, 3, 127, 128, 129, 255, 640, 1500, -2, -1]] = torch.tensor([3, 1, 0.5, 7, 2, 2, 4, 1.5, 0.1, 9.0])
    count = 200_000
    drawn_V = torch.zeros(size, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        drawn_V += draw(weight_V.expand(count // 10, -1), generator).bincount(minlength=size)
    expected_V = count * (weight_V / weight_V.sum()).double()
    some_V = weight_V > 0
    assert (drawn_V[~some_V] == 0).all()
    assert float(((drawn_V - expected_V)[some_V] ** 2 / expected_V[some_V]).sum()) < 45


@pytest.mark.parametrize("size", [8, 10_000])  # at once, and a chunk first
def test_a_row_with_nan_still_gets_an_id(size: int) -> None:
    """Any id: the engine counts the row as broken (statistics.py), for which it must look it up."""
    weight_BV = torch.rand(30, size)
    weight_BV[1, 4] = torch.nan
    token_B = draw(weight_BV)
    assert ((token_B >= 0) & (token_B < size)).all() and token_B[1] == 0
