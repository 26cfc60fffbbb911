"""Every rollout policy in the real engine: its tokens follow its μ, by float64 Hugging Face models.

One engine, one seed; the policies take turns. Each must pass at ALPHA for its μ and fail below POWER for π_S, which
shows that the test could fail. 9 policies × 3 p-values: a correct engine fails one with probability 3e-5 (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from engine import BlendedEngine, engine, make_pair
from engine_oracle import Visited, blend_of, p_tokens, p_uniform, uniforms, visit
from torch import Tensor

from verl_trb.policies import policy_names
from verl_trb.rollout.generation import Rollout
from verl_trb.rollout.request import BlendedRequest

ALPHA, POWER = 1e-6, 1e-12
POLICIES: dict[str, dict[str, float]] = {
    "student": {},
    "trb": {"epsilon": 0.2},
    "fixed_epsilon": {"epsilon": 0.1},
    "saki": {"epsilon": 0.2},
    "fixed_beta": {"beta": 0.4},
    "teacher_mix": {"alpha": 0.3},
    "teacher": {},
    "skd": {"k": 12, "temperature": 0.6},
    "temperature": {"temperature": 0.6},
}


def definition(name: str, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """log μ [N, V] of a policy of POLICIES, float64."""
    values, live = POLICIES[name], student_NV[0] > -math.inf
    if "epsilon" in values:
        return blend_of(student_NV, teacher_NV, torch.full_like(student_NV[:, 0], values["epsilon"]))[0]
    s_NV, t_NV = student_NV[:, live], teacher_NV[:, live]
    q_NV, p_NV = s_NV.exp(), t_NV.exp()
    if name == "skd":
        kept_NV = torch.zeros_like(q_NV).scatter(1, p_NV.argsort(descending=True)[:, : int(values["k"])], 1.0)
        power_NV = p_NV ** (1 / values["temperature"])
        outside_N1 = (q_NV * (1 - kept_NV)).sum(1, keepdim=True)
        mu_NV = q_NV * kept_NV + outside_N1 * power_NV / power_NV.sum(1, keepdim=True)
    else:
        mu_NV = {
            "student": lambda: q_NV,
            "teacher": lambda: p_NV,
            "teacher_mix": lambda: values["alpha"] * p_NV + (1 - values["alpha"]) * q_NV,
            "fixed_beta": lambda: (q_NV ** (1 - values["beta"])) * (p_NV ** values["beta"]),
            "temperature": lambda: q_NV ** (1 / values["temperature"]),
        }[name]()
    log_mu_NV = torch.full_like(student_NV, -math.inf)
    log_mu_NV[:, live] = (mu_NV / mu_NV.sum(1, keepdim=True)).log()
    return log_mu_NV


@dataclass
class Run:
    """Rollouts of one policy, what the oracle says of them, and the engine's own sums."""

    rollouts: list[Rollout]
    visited: Visited
    log_mu_NV: Tensor
    statistics: dict[str, float]


def make_run(blended: BlendedEngine, name: str, prompts: list[list[int]], tokens: int) -> Run:
    blended.use(name)
    blended.llm.reset_prefix_cache()
    blended.statistics()
    torch.manual_seed(0)
    rollouts = blended.rollouts(prompts, POLICIES[name], tokens)
    pair = blended.pair
    visited = visit(prompts, rollouts, [0.0] * len(prompts), pair.student, pair.teacher, pair.vocabulary)
    return Run(rollouts, visited, definition(name, visited.student_NV, visited.teacher_NV), blended.statistics())


def some_prompts(count: int, length: int) -> list[list[int]]:
    return torch.randint(3, 128, (count, length), generator=torch.Generator().manual_seed(4)).tolist()


@pytest.fixture(scope="module")
def blended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlendedEngine]:
    torch.set_num_threads(1)
    with engine(make_pair(tmp_path_factory.mktemp("pair")), draft_tokens=3) as blended:
        yield blended


def test_every_policy_is_here() -> None:
    assert sorted(POLICIES) == policy_names()


@pytest.mark.parametrize("name", POLICIES)
def test_first_token(blended: BlendedEngine, name: str) -> None:
    """Pearson's χ² of the counts of all tokens after one prompt."""
    run = make_run(blended, name, some_prompts(1, 7) * 1500, tokens=1)
    assert p_tokens(run.visited, run.log_mu_NV) > ALPHA
    if name != "student":
        assert p_tokens(run.visited, run.visited.student_NV) < POWER


@pytest.mark.parametrize("name", POLICIES)
def test_rollouts(blended: BlendedEngine, name: str) -> None:
    """All tokens of many rollouts: they follow μ, are returned with log μ, and their mean log-ratio is KL(μ‖π_S)."""
    run = make_run(blended, name, some_prompts(250, 7), tokens=10)
    visited, log_mu_NV = run.visited, run.log_mu_NV
    assert p_uniform(uniforms(visited, log_mu_NV)) > ALPHA
    assert name == "student" or p_uniform(uniforms(visited, visited.student_NV)) < POWER
    log_mu_N = visited.at_token(log_mu_NV)
    # The solver's tolerance of 1e-3 in ε, and float32 models.
    assert (-visited.logprob_N.abs() - log_mu_N).abs().max() < 4e-3
    assert (-visited.logprob_N.abs() - log_mu_N).abs().mean() < 3e-4

    log_ratio_N = log_mu_N - visited.at_token(visited.student_NV)
    kl_N = (log_mu_NV.exp() * (log_mu_NV - visited.student_NV).masked_fill(log_mu_NV == -math.inf, 0)).sum(-1)
    tokens = run.statistics["tokens"]
    assert tokens == len(log_ratio_N)
    assert run.statistics["log_ratio"] / tokens == pytest.approx(
        float(log_ratio_N.mean()), abs=1e-4 + 1e-3 * (name != "student")
    )
    assert run.statistics["kl"] / tokens == pytest.approx(float(kl_N.mean()), rel=2e-3, abs=1e-6)
    # A martingale: log-ratio minus its mean given the prefix; beyond 5 standard errors with probability 6e-7.
    excess_N = log_ratio_N - kl_N
    assert abs(float(excess_N.sum())) <= 5 * float(excess_N.square().sum().sqrt())
    tv = float((log_mu_NV.exp() - visited.student_NV.exp()).abs().sum(-1).mean()) / 2
    accepted = run.statistics["accepted"] / run.statistics["verified"]
    assert accepted == pytest.approx(1 - tv, abs=5 / (2 * tokens**0.5))


@pytest.mark.parametrize("name", POLICIES)
def test_neighbours_without_guidance_are_the_student_s(blended: BlendedEngine, name: str) -> None:
    """Mixed in one batch, two by two: rows without parameters are drawn from π_S and nothing else."""
    prompts = some_prompts(200, 7)
    blended.use(name)
    torch.manual_seed(1)
    rollouts = blended.rollouts(prompts, [POLICIES[name] if i % 2 else None for i in range(200)], 8)
    pair = blended.pair
    visited = visit(prompts, rollouts, [0.0] * 200, pair.student, pair.teacher, pair.vocabulary)
    alone = visited.where(visited.rollout_N % 2 == 0)
    assert p_uniform(uniforms(alone, alone.student_NV)) > ALPHA
    assert (alone.logprob_N - alone.at_token(alone.student_NV)).abs().max() < 5e-5
    assert p_uniform(uniforms(alone, alone.teacher_NV)) < POWER


def test_marks_are_where_the_sampler_replaced_the_draft(blended: BlendedEngine) -> None:
    """Against the drafts that vLLM holds: a correction is a token other than its draft."""
    run = make_run(blended, "saki", some_prompts(250, 7), tokens=10)
    assert not any(rollout.resubmitted for rollout in run.rollouts)
    marked = [logp > 0 for rollout in run.rollouts for logp in rollout.logprobs]
    replaced = [flag for rollout in run.rollouts for flag in rollout.raw.corrected]
    assert marked == replaced
    assert sum(marked) == run.statistics["verified"] - run.statistics["accepted"]
    assert 100 < sum(marked) < len(marked) / 2


def test_other_policies_return_log_probabilities_as_they_are(blended: BlendedEngine) -> None:
    run = make_run(blended, "trb", some_prompts(100, 7), tokens=10)
    assert any(flag for rollout in run.rollouts for flag in rollout.raw.corrected)
    assert max(logp for rollout in run.rollouts for logp in rollout.logprobs) < 1e-5


def test_traces_are_the_rollouts_and_leave_no_trace(blended: BlendedEngine) -> None:
    """Traced requests return what the sampler saw; the random numbers afterwards are as if they had not been."""
    blended.use("trb")
    prompts, eos = some_prompts(40, 7), blended.vocabulary.student_eos
    torch.manual_seed(0)
    blended.llm.collective_rpc("begin_traces")
    before = torch.get_rng_state()
    asked = {"temperature": 1.0, "max_tokens": 11, "logprobs": 0, "detokenize": False, "stop_token_ids": [eos]}
    requests = [
        {**asked, "extra_args": BlendedRequest(POLICIES["trb"], p[-1], None, f"{i}").extra_args()}
        for i, p in enumerate(prompts)
    ]
    blended.corrected.clear()
    outputs = blended.generate([p[:-1] for p in prompts], requests)
    assert not torch.equal(torch.get_rng_state(), before)
    traces = blended.llm.collective_rpc("take_traces")[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert blended.llm.collective_rpc("take_traces")[0] == {}

    corrections = 0
    for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        trace, answer = traces[str(i)], output.outputs[0]
        assert trace["tokens"] == list(answer.token_ids)[1:]
        flags = blended._blocks_of(blended.corrected, output.request_id)
        assert trace["corrected"] == [flag for block in flags for flag in block]
        logprobs = [entry[token].logprob for token, entry in zip(answer.token_ids, answer.logprobs, strict=True)]
        assert trace["log_mu"] == pytest.approx(logprobs[1:])
        rollout = Rollout(token_ids=trace["tokens"], logprobs=logprobs[1:])
        visited = visit([prompt], [rollout], [0.0], blended.pair.student, blended.pair.teacher, blended.vocabulary)
        assert trace["logp_student"] == pytest.approx(visited.at_token(visited.student_NV).tolist(), abs=1e-3)
        for token, draft, corrected in zip(trace["tokens"], trace["drafts"], trace["corrected"], strict=True):
            assert corrected == (token != draft)
        corrections += sum(trace["corrected"])
    assert corrections > 10


def test_temperature_does_without_the_teacher(blended: BlendedEngine) -> None:
    """The teacher's forward pass is skipped: the same tokens under one seed, and still the tempered student's."""
    prompts, skip = some_prompts(250, 7), "skip_teacher"
    asked = make_run(blended, "temperature", prompts, tokens=8)
    blended.llm.collective_rpc(skip, kwargs={"skipped": True})
    try:
        skipped = make_run(blended, "temperature", prompts, tokens=8)
    finally:
        blended.llm.reset_prefix_cache()
        blended.llm.collective_rpc(skip, kwargs={"skipped": False})
    assert [r.token_ids for r in skipped.rollouts] == [r.token_ids for r in asked.rollouts]
    assert p_uniform(uniforms(skipped.visited, skipped.log_mu_NV)) > ALPHA


def test_a_policy_that_needs_the_skipped_teacher_is_an_error(blended: BlendedEngine) -> None:
    """(The last test here: the engine is of no use afterwards.)"""
    blended.use("teacher")
    blended.llm.collective_rpc("skip_teacher", kwargs={"skipped": True})
    with pytest.raises(RuntimeError, match="'teacher' reached the engine while the teacher was skipped"):
        blended.rollouts(some_prompts(2, 7), POLICIES["teacher"], 4)
