"""Rollouts of the real engine follow μ, and say so: against float64 Hugging Face models, at γ = 4 and γ = 1.

Every p-value below must exceed ALPHA where the hypothesis is μ and fall below POWER where it is π_S or π_T,
so each test shows that it can fail. About 50 p-values: a correct engine fails one of them with probability
5e-4, and not at random on one machine: the seeds are fixed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine import EOS, BlendedEngine, Guidance, engine, make_pair
from engine_oracle import (
    Visited,
    blend_of,
    check_logprobs,
    p_serial,
    p_tokens,
    p_uniform,
    shared_logprobs,
    uniforms,
    visit,
    z_scores,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from verl_trb.rollout.generation import Rollout
from verl_trb.verified import HIDDEN_STATES, Verified, byte_rows, from_bytes

ALPHA, POWER = 1e-5, 1e-12
EPSILONS = (0.0, 0.1, 0.3)
BUDGETS = (12, 11, 9, 6)  # tokens; most are no multiple of γ


@dataclass
class Run:
    """Rollouts at mixed ε in shared batches, what the oracle says of them, and the engine's own sums."""

    engine: BlendedEngine
    prompts: list[list[int]]
    epsilons: list[float]
    budgets: list[int]
    rollouts: list[Rollout]
    visited: Visited
    log_mu_NV: Tensor
    beta_N: Tensor
    kl_N: Tensor
    statistics: dict[str, float]

    def block_position_N(self) -> Tensor:
        """Of every token its place in its block: 0 … γ − 1."""
        return torch.tensor([g for r in self.rollouts for size in r.raw.blocks for g in range(size)])


def random_prompts(count: int, length: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (count, length), generator=generator).tolist()


def make_run(blended: BlendedEngine, prompts: list[list[int]], epsilons: list[float], budgets: list[int]) -> Run:
    torch.manual_seed(0)
    blended.statistics()
    rollouts = blended.rollouts(prompts, epsilons, budgets)
    pair = blended.pair
    visited = visit(prompts, rollouts, epsilons, pair.student, pair.teacher, pair.vocabulary)
    blend = blend_of(visited.student_NV, visited.teacher_NV, visited.epsilon_N)
    return Run(blended, prompts, epsilons, budgets, rollouts, visited, *blend, blended.statistics())


@pytest.fixture(scope="module", params=[4, 1], ids=["gamma4", "gamma1"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    torch.set_num_threads(1)
    pair = make_pair(tmp_path_factory.mktemp("pair"))
    with engine(pair, draft_tokens=request.param) as blended:
        prompts = [prompt for prompt in random_prompts(4, 6, seed=1) for _ in range(300)]
        count = len(prompts)
        budgets = [BUDGETS[(i // len(EPSILONS)) % len(BUDGETS)] for i in range(count)]
        yield make_run(blended, prompts, [EPSILONS[i % len(EPSILONS)] for i in range(count)], budgets)


def check(run: Run, mask_N: Tensor) -> None:
    """The tokens of the mask follow μ, and neither model where ε > 0."""
    visited = run.visited.where(mask_N)
    assert p_uniform(uniforms(visited, run.log_mu_NV[mask_N])) > ALPHA
    blended = visited.epsilon_N > 0
    only = visited.where(blended)
    assert p_uniform(uniforms(only, only.teacher_NV)) < POWER
    assert p_uniform(uniforms(only, only.student_NV)) < POWER


def test_the_trust_region_binds(run: Run) -> None:
    """What is tested is neither of the two models: 0 < β < 1 nearly everywhere."""
    beta_N = run.beta_N[run.visited.epsilon_N > 0]
    assert ((beta_N > 0.05) & (beta_N < 0.95)).double().mean() > 0.98


def test_first_token_follows_mu(run: Run) -> None:
    """Pearson's χ² of the counts of all tokens after one prompt."""
    prompts = run.prompts[:1] * 2000
    first = make_run(run.engine, prompts, [0.1] * len(prompts), [1] * len(prompts))
    assert p_tokens(first.visited, first.log_mu_NV) > ALPHA
    assert p_tokens(first.visited, first.visited.student_NV) < POWER
    assert p_tokens(first.visited, first.visited.teacher_NV) < POWER


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_every_token_follows_mu_in_batches_of_mixed_epsilon(run: Run, epsilon: float) -> None:
    """ε = 0 rows are the student's exactly, though their neighbours are blended."""
    at_N = run.visited.epsilon_N == epsilon
    visited = run.visited.where(at_N)
    hypotheses = {"mu": run.log_mu_NV[at_N], "student": visited.student_NV, "teacher": visited.teacher_NV}
    p = {name: p_uniform(uniforms(visited, logp_NV)) for name, logp_NV in hypotheses.items()}
    assert p["mu"] > ALPHA
    assert p["teacher"] < POWER
    assert p["student"] < POWER if epsilon else p["student"] == p["mu"]
    other_N = torch.full_like(visited.epsilon_N, 0.03)
    wrong_NV, _, _ = blend_of(visited.student_NV, visited.teacher_NV, other_N)
    assert p_uniform(uniforms(visited, wrong_NV)) < 1e-6  # another row's ε would be seen


def test_tokens_follow_mu_at_every_place_in_a_block(run: Run) -> None:
    """First of a block (after a fully accepted block or a correction), inside it, and last of it."""
    place_N = run.block_position_N()
    assert place_N.max() == run.engine.draft_tokens - 1
    later_N = run.visited.position_N > 0
    for place in range(run.engine.draft_tokens):
        check(run, (place_N == place) & later_N)


def test_tokens_follow_mu_at_every_position(run: Run) -> None:
    for low, high in ((0, 1), (1, 3), (3, 5), (5, 8), (8, 12)):
        check(run, (run.visited.position_N >= low) & (run.visited.position_N < high))


def test_successive_tokens_are_independent_given_their_prefixes(run: Run) -> None:
    for epsilon in EPSILONS:
        at_N = run.visited.epsilon_N == epsilon
        visited = run.visited.where(at_N)
        assert p_serial(visited, uniforms(visited, run.log_mu_NV[at_N])) > ALPHA
        assert p_serial(visited, uniforms(visited, visited.teacher_NV)) < POWER
        if epsilon:
            assert p_serial(visited, uniforms(visited, visited.student_NV)) < POWER


def test_eos_and_frequent_tokens_have_their_probability(run: Run) -> None:
    """z-scores of single tokens; each is beyond 5 with probability 6e-7."""
    frequent = run.visited.token_N.bincount().topk(12).indices.tolist()
    assert EOS in frequent
    assert max(map(abs, z_scores(run.visited, run.log_mu_NV, frequent))) < 5
    assert max(map(abs, z_scores(run.visited, run.visited.teacher_NV, frequent))) > 10


def test_returned_logprobs_are_log_mu(run: Run) -> None:
    check_logprobs(run.visited)
    gap_N = (run.visited.logprob_N - run.visited.at_token(run.visited.student_NV)).abs()
    assert gap_N[run.visited.epsilon_N == 0].max() < 5e-5
    assert gap_N[run.visited.epsilon_N > 0].mean() > 0.1  # and nothing like log π_S


def test_rollouts_end_where_they_should(run: Run) -> None:
    """EOS and the token limit, both inside blocks: nothing follows, is missing, or is resubmitted."""
    cut = {"eos": 0, "limit": 0}
    for rollout, budget in zip(run.rollouts, run.budgets, strict=True):
        assert len(rollout.token_ids) == len(rollout.logprobs) <= budget
        assert rollout.resubmitted == 0
        assert EOS not in rollout.token_ids[:-1]
        assert run.engine.vocabulary.marker not in rollout.token_ids
        inside = rollout.raw.blocks[-1] < run.engine.draft_tokens
        if rollout.token_ids[-1] == EOS:
            assert rollout.stop_reason == "stop"
            cut["eos"] += inside
        else:
            assert len(rollout.token_ids) == budget and rollout.stop_reason == "length"
            cut["limit"] += inside
    if run.engine.draft_tokens > 1:
        assert min(cut.values()) > 20


def test_statistics_are_those_of_the_rollout_tokens(run: Run) -> None:
    """Sums over exactly the tokens returned, whether EOS, the limit or a correction cut a block."""
    visited, sums = run.visited, run.statistics
    count = len(visited.token_N)
    blocks = sum(len(rollout.raw.blocks) for rollout in run.rollouts)
    assert (sums["tokens"], sums["blocks"], sums["verified"]) == (count, blocks, count)
    log_mu_N = visited.at_token(run.log_mu_NV)
    log_ratio_N = log_mu_N - visited.at_token(visited.student_NV)
    assert sums["log_ratio"] == pytest.approx(float(log_ratio_N.sum()), rel=5e-3)
    assert sums["kl"] == pytest.approx(float(run.kl_N.sum()), rel=1.1e-3)
    assert sums["kl"] <= float(run.kl_N.sum()) + 1e-3
    assert sums["beta"] == pytest.approx(float(run.beta_N.sum()), rel=1.1e-3)
    assert sums["beta_max"] == pytest.approx(float(run.beta_N.max()), rel=1e-3)
    assert sums["kl_max"] <= max(EPSILONS)


def test_log_ratio_averages_to_the_kl_and_rejection_to_the_total_variation(run: Run) -> None:
    """E[log μ − log π_S] = KL(μ‖π_S) ≤ ε, and P(rejection) = TV(μ, π_S), each within 5 standard errors."""
    visited, sums = run.visited, run.statistics
    gap_NV = (run.log_mu_NV - visited.student_NV).nan_to_num(nan=0.0)
    variance = float((run.log_mu_NV.exp() * (gap_NV - run.kl_N[:, None]) ** 2).sum())
    assert abs(sums["log_ratio"] - float(run.kl_N.sum())) < 5 * variance**0.5
    assert float(run.kl_N.sum()) <= float(visited.epsilon_N.sum()) + 1e-9
    tv_N = (run.log_mu_NV.exp() - visited.student_NV.exp()).abs().sum(-1) / 2
    error = 5 * float((tv_N * (1 - tv_N)).sum()) ** 0.5
    assert abs(sums["verified"] - sums["accepted"] - float(tv_N.sum())) < error
    assert abs(sums["tv"] - float(tv_N.sum())) < error
    assert float(tv_N.sum()) > 3 * error  # 0 would be seen


def test_epsilon_zero_is_the_student_policy_token_for_token(run: Run) -> None:
    """One seed, two policies: the same draws. At ε > 0 they part."""
    blended, prompts = run.engine, run.prompts[::20]

    def sample(guidance: Guidance) -> list[Rollout]:
        blended.llm.reset_prefix_cache()
        torch.manual_seed(7)
        return blended.rollouts(prompts, guidance, 12)

    def pairs(rollouts: list[Rollout]) -> list[tuple[list[int], list[float]]]:
        return [(rollout.token_ids, rollout.logprobs) for rollout in rollouts]

    trb, budget = pairs(sample(0.0)), pairs(sample(0.3))
    blended.use("student")
    student = pairs(sample({}))
    blended.use("trb")
    assert trb == student
    assert trb != budget


def test_skipping_the_teacher_changes_nothing_at_epsilon_zero(run: Run) -> None:
    """The same tokens under one seed, and exact rollouts again after the gate is opened and the cache reset."""
    blended, prompts = run.engine, random_prompts(4, 40, seed=8) * 40

    def sample(epsilon: float) -> list[Rollout]:
        blended.llm.reset_prefix_cache()
        torch.manual_seed(7)
        return blended.rollouts(prompts, epsilon, 8)

    with_teacher = [(rollout.token_ids, rollout.logprobs) for rollout in sample(0.0)]
    blended.llm.collective_rpc("skip_teacher", kwargs={"skipped": True})
    without = [(rollout.token_ids, rollout.logprobs) for rollout in sample(0.0)]
    blended.llm.collective_rpc("skip_teacher", kwargs={"skipped": False})
    assert without == with_teacher
    pair = blended.pair
    visited = visit(prompts, sample(0.3), [0.3] * len(prompts), pair.student, pair.teacher, pair.vocabulary)
    check_logprobs(visited)


def test_prefix_cache_hits_change_nothing(run: Run) -> None:
    """Prompts that are cached but for their last token, joining a batch that is decoding.

    vLLM pads such a request with placeholder drafts; only its forced token may come of them, and no other row
    of the batch may lose its drafts.
    """
    blended = run.engine
    shared = random_prompts(1, 16, seed=5)[0]
    prompts = [shared + tail for tail in random_prompts(2, 18, seed=6)] * 100
    blended.llm.reset_prefix_cache()
    hits = make_run(blended, prompts, [0.1, 0.1, 0.3, 0.3] * 50, [12] * len(prompts))
    cached = [rollout.raw.num_cached_tokens for rollout in hits.rollouts]
    assert sum(n == 32 for n in cached) >= 100  # 33 are submitted, in blocks of 16
    assert sum(rollout.resubmitted for rollout in hits.rollouts) == 0
    check_logprobs(hits.visited)
    check(hits, torch.ones_like(hits.visited.token_N, dtype=torch.bool))


def test_blocks_of_any_length_leave_the_rollouts_exact(run: Run) -> None:
    """Lengths that change from step to step, known before the block is drafted; also where vLLM schedules none."""
    lengths, draw = run.engine.worker.draft_lengths[0], random.Random(0)
    lengths.choose = lambda rows: draw.randint(1, run.engine.draft_tokens)
    try:
        prompts = random_prompts(100, 6, seed=9) * 4
        varied = make_run(run.engine, prompts, [0.1, 0.3] * 200, [12, 7, 12, 5] * 100)
    finally:
        del lengths.choose
    assert sum(rollout.resubmitted for rollout in varied.rollouts) == 0
    check_logprobs(varied.visited)
    place_N = varied.block_position_N()
    check(varied, place_N == 0)
    if run.engine.draft_tokens > 1:
        assert place_N.max() == run.engine.draft_tokens - 1
        check(varied, place_N > 0)


def test_what_the_models_compute(run: Run) -> None:
    """Of a block the teacher reads γ positions, none for a bonus; the student passes γ times over one token a row, and
    drafts nothing behind the request's end.
    """
    blended, runner = run.engine, run.engine.worker.model_runner
    seen: dict[str, list[int]] = {"teacher": [], "student": []}
    teacher, student = runner._model_forward, runner.drafter.model.forward

    def of_teacher(*args: Any, **kwargs: Any) -> Any:
        seen["teacher"].append(len(kwargs["positions"]))
        return teacher(*args, **kwargs)

    def of_student(*args: Any, **kwargs: Any) -> Any:
        seen["student"].append(len(kwargs["positions"]))
        return student(*args, **kwargs)

    runner._model_forward, runner.drafter.model.forward = of_teacher, of_student
    try:
        blended.llm.reset_prefix_cache()
        torch.manual_seed(0)
        (rollout,) = blended.rollouts([random_prompts(1, 20, seed=11)[0]], 0.1, 12)
    finally:
        runner._model_forward, runner.drafter.model.forward = teacher, student
    lengths, left = [], 12
    for emitted in rollout.raw.blocks:
        lengths.append(min(blended.draft_tokens, left))
        left -= emitted
    assert lengths[-1] < max(blended.draft_tokens, 2), "the last block was to be a short one"
    assert seen["teacher"] == [19, *lengths]
    assert seen["student"] == [20] + [1] * (len(seen["student"]) - 1)
    assert len(seen["student"]) == sum(lengths)


def test_what_is_cached_of_ended_requests_is_both_models(run: Run) -> None:
    """Prompts that are whole rollouts, whose last block nothing was drafted after: the cache has both models' keys."""
    blended = run.engine
    blended.llm.reset_prefix_cache()
    torch.manual_seed(0)
    prompts = random_prompts(100, 15, seed=21)
    whole = [prompt + blended.rollouts([prompt], 0.1, 40)[0].token_ids for prompt in prompts]
    whole = [prompt for prompt in whole if EOS not in prompt] * 4
    assert len(whole) >= 80
    again = make_run(blended, whole, [0.1, 0.3] * (len(whole) // 2), [6] * len(whole))
    assert all(rollout.raw.num_cached_tokens == 48 for rollout in again.rollouts)
    check_logprobs(again.visited)
    check(again, torch.ones_like(again.visited.token_N, dtype=torch.bool))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_is_kept_of_the_teacher_is_the_teachers(run: Run, temperature: float) -> None:
    """At every token of rollouts of mixed lengths, some guided by another ε, some by none."""
    k = 5
    visited, kept_NC = visit_keeping(run, k, temperature)
    known = Verified.unpacked(kept_NC)
    close = {"rtol": 0.0, "atol": 2e-4, "check_dtype": False}
    student_NV, teacher_NV = visited.student_NV, visited.teacher_NV
    torch.testing.assert_close(student_NV.gather(-1, known.index_NK), student_NV.topk(k).values, **close)
    torch.testing.assert_close(known.logp_teacher_NK, teacher_NV.gather(-1, known.index_NK), **close)
    torch.testing.assert_close(known.logp_teacher_N, visited.at_token(teacher_NV), **close)
    gap_NV = (student_NV - teacher_NV).nan_to_num(0.0)
    torch.testing.assert_close(known.reverse_kl_N, (student_NV.exp() * gap_NV).sum(-1), **close)
    torch.testing.assert_close(known.teacher_entropy_N, torch.special.entr(teacher_NV.exp()).sum(-1), **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_student_knows_its_logprobs_to_float32(run: Run, dtype: torch.dtype) -> None:
    """Also of tokens whose probability underflows; masked ones stay impossible, NaN stays NaN."""
    logits_BV = torch.randn(4, 3000, generator=torch.Generator().manual_seed(0)).mul(
        torch.tensor([[1], [9], [60], [1]])
    )
    logits_BV[1, 7], logits_BV[2] = -torch.inf, logits_BV[2] + 500
    logits_BV = logits_BV.to(dtype)
    temperature_B = torch.tensor([1.0, 0.7, 0.5, 1.0])
    exact_BV = (logits_BV.double() / temperature_B.double()[:, None]).log_softmax(-1)
    logits_BV[3, 5] = torch.nan
    asked: Any = SimpleNamespace(all_random=True, temperature=temperature_B)
    token_B, logp_BV = run.engine.worker.model_runner.drafter._sample_from_logits(logits_BV, asked)
    assert logp_BV[3].isnan().all() and exact_BV[2].min() < -200 and exact_BV[1, 7] == -torch.inf
    torch.testing.assert_close(logp_BV[:3].double(), exact_BV[:3], rtol=1e-6, atol=1e-5)
    assert (exact_BV.gather(1, token_B[:, None])[:3] > -20).all()


def test_hidden_states_that_are_kept_are_the_teachers(run: Run) -> None:
    """Its output layer makes of them its distribution at every token."""
    visited, hidden_NE = visit_keeping(run, HIDDEN_STATES)
    teacher = AutoModelForCausalLM.from_pretrained(run.engine.pair.teacher, dtype=torch.float64)
    logits_NV = teacher.get_output_embeddings()(hidden_NE.double())
    teacher_NV = shared_logprobs(logits_NV, run.engine.pair.vocabulary, teacher=True)
    torch.testing.assert_close(teacher_NV, visited.teacher_NV, rtol=0.0, atol=2e-4)


def visit_keeping(run: Run, keep: int, temperature: float = 1.0) -> tuple[Visited, Tensor]:
    """Rollouts of mixed lengths, guided by two ε, and what was kept at each of their tokens."""
    blended, pair = run.engine, run.engine.pair
    prompts, epsilons = run.prompts[::20], [0.1, 0.3, 0.1] * (len(run.prompts[::20]) // 3)
    rollouts = blended.rollouts(prompts, epsilons, run.budgets[::20], temperature, keep=keep)
    kept = []
    for number, rollout in enumerate(rollouts):
        kept.append(from_bytes(*byte_rows(*blended.worker.take_kept(str(number)))))
        assert len(kept[-1]) == len(rollout.token_ids)
    visited = visit(prompts, rollouts, epsilons, pair.student, pair.teacher, pair.vocabulary, temperature)
    return visited, torch.cat(kept)


def test_temperature_applies_to_both_models(run: Run) -> None:
    """μ is the blend of the tempered models; temperatures are mixed in a batch."""
    blended, pair = run.engine, run.engine.pair
    prompts, temperatures = run.prompts[::4], [0.6, 1.5] * 150
    torch.manual_seed(0)
    rollouts = blended.rollouts(prompts, 0.1, 8, temperatures)
    for which, temperature in enumerate((0.6, 1.5)):
        models = (pair.student, pair.teacher, pair.vocabulary)
        some = prompts[which::2], rollouts[which::2], [0.1] * 150
        visited = visit(*some, *models, temperature=temperature)
        check_logprobs(visited)
        log_mu_NV, _, _ = blend_of(visited.student_NV, visited.teacher_NV, visited.epsilon_N)
        assert p_uniform(uniforms(visited, log_mu_NV)) > ALPHA
        untempered = visit(*some, *models)
        log_mu_NV, _, _ = blend_of(untempered.student_NV, untempered.teacher_NV, untempered.epsilon_N)
        assert p_uniform(uniforms(untempered, log_mu_NV)) < POWER
