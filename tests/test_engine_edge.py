"""The real engine where it is short of everything, and where models disagree on how a text ends.

One cramped engine for all: eight sequences, a KV cache that forces preemptions, a token budget far below the
prompts' lengths, the smallest `max_model_len` that is allowed, and a teacher with an EOS of its own. What it
returns must be as exact as from an engine with room. Error rates as in test_engine_exact.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from engine import EOS, TEACHER_EOS, BlendedEngine, engine, make_pair
from engine_oracle import (
    Visited,
    blend_of,
    check_logprobs,
    next_token_logprobs,
    p_uniform,
    uniforms,
    visit,
    z_scores,
)

from verl_trb.rollout.engine_args import batched_tokens, model_length
from verl_trb.rollout.generation import Rollout
from verl_trb.rollout.request import BlendedRequest

ALPHA, POWER = 1e-5, 1e-12
GAMMA, SEQUENCES = 4, 8
PROMPT, RESPONSE = 72, 24  # the longest, in tokens
TEACHER_ALONE = 50.0  # an ε in nats that no pair of distributions here exceeds: μ = π_T
EPSILONS = (0.0, 0.2, TEACHER_ALONE)


def prompts_of(lengths: list[int], seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 128, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module")
def cramped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlendedEngine]:
    torch.set_num_threads(1)
    pair = make_pair(tmp_path_factory.mktemp("pair"), teacher_eos=TEACHER_EOS, seed=10)
    sizes = {
        "max_num_seqs": SEQUENCES,
        "max_num_batched_tokens": batched_tokens(SEQUENCES, GAMMA),
        "max_model_len": model_length(PROMPT, RESPONSE, GAMMA),
        "num_gpu_blocks_override": 18,  # of 16 tokens: three full sequences, at most
    }
    with engine(pair, draft_tokens=GAMMA, **sizes) as blended:
        yield blended


@dataclass
class Squeezed:
    """Rollouts of the cramped engine, what the oracle says of them, and how many requests were preempted."""

    prompts: list[list[int]]
    rollouts: list[Rollout]
    visited: Visited
    preemptions: int


@pytest.fixture(scope="module")
def squeezed(cramped: BlendedEngine) -> Squeezed:
    """Prompts of 2 … 72 tokens at mixed ε."""
    prompts = prompts_of([PROMPT - (i * 7) % (PROMPT - 1) for i in range(180)], seed=0)
    epsilons = [EPSILONS[i % 3] for i in range(len(prompts))]
    torch.manual_seed(0)
    before, pair = cramped.preemptions, cramped.pair
    rollouts = cramped.rollouts(prompts, epsilons, RESPONSE)
    visited = visit(prompts, rollouts, epsilons, pair.student, pair.teacher, pair.vocabulary)
    return Squeezed(prompts, rollouts, visited, cramped.preemptions - before)


def test_preemption_ends_a_request_by_its_marker_and_the_rollout_goes_on(
    cramped: BlendedEngine, squeezed: Squeezed
) -> None:
    """Nothing but a preemption costs a request its drafts (not the budget, not the end of max_model_len)."""
    rollouts = squeezed.rollouts
    resubmitted = sum(rollout.resubmitted for rollout in rollouts)
    assert 15 < resubmitted <= squeezed.preemptions  # one preempted in its prefill starts that anew
    for rollout in rollouts:
        assert cramped.vocabulary.marker not in rollout.token_ids
        assert rollout.token_ids[-1] == EOS or len(rollout.token_ids) == RESPONSE
    whole = [r for r in rollouts if r.resubmitted and len(r.token_ids) == RESPONSE]
    assert len(whole) > 5


def test_chunked_prefill_and_preemption_leave_the_rollouts_exact(squeezed: Squeezed) -> None:
    """Prompts longer than the token budget of a step; blocks that were lost and computed again."""
    assert batched_tokens(SEQUENCES, GAMMA) < PROMPT
    check_logprobs(squeezed.visited)
    for epsilon in EPSILONS:
        only = squeezed.visited.where(squeezed.visited.epsilon_N == epsilon)
        log_mu_NV, _, _ = blend_of(only.student_NV, only.teacher_NV, only.epsilon_N)
        assert p_uniform(uniforms(only, log_mu_NV)) > ALPHA
        if epsilon != 0:
            assert p_uniform(uniforms(only, only.student_NV)) < POWER
        if epsilon != TEACHER_ALONE:
            assert p_uniform(uniforms(only, only.teacher_NV)) < POWER


def test_rollouts_that_were_resubmitted_are_exact(squeezed: Squeezed) -> None:
    again = torch.tensor([rollout.resubmitted > 0 for rollout in squeezed.rollouts])
    only = squeezed.visited.where(again[squeezed.visited.rollout_N] & (squeezed.visited.epsilon_N < 1))
    log_mu_NV, _, _ = blend_of(only.student_NV, only.teacher_NV, only.epsilon_N)
    assert p_uniform(uniforms(only, log_mu_NV)) > ALPHA
    assert p_uniform(uniforms(only, only.teacher_NV)) < POWER


def test_the_teachers_eos_counts_as_the_students(cramped: BlendedEngine, squeezed: Squeezed) -> None:
    """Both EOS are emitted as the student's. With the teacher's own masked instead, EOS would be rarer."""
    vocabulary, visited = cramped.vocabulary, squeezed.visited
    assert vocabulary.marker == TEACHER_EOS != vocabulary.student_eos
    assert all(TEACHER_EOS not in rollout.token_ids for rollout in squeezed.rollouts)
    responses = [rollout.token_ids for rollout in squeezed.rollouts]
    masked_NV = next_token_logprobs(cramped.pair.teacher, squeezed.prompts, responses, vocabulary)
    guided_N = visited.epsilon_N == TEACHER_ALONE
    guided = visited.where(guided_N)
    assert abs(z_scores(guided, guided.teacher_NV, [EOS])[0]) < 5
    assert z_scores(guided, masked_NV[guided_N], [EOS])[0] > 7


def test_requests_without_our_settings_are_ended_unsampled(cramped: BlendedEngine) -> None:
    """A request that did not come through our server gets markers only; its neighbours do not notice."""
    vocabulary = cramped.vocabulary
    prompts = prompts_of([20] * 6, seed=3)
    stop = {"temperature": 1.0, "max_tokens": 9, "logprobs": 0, "detokenize": False}
    ours = {**stop, "stop_token_ids": [vocabulary.student_eos, vocabulary.marker]}
    params = [
        {**ours, "extra_args": BlendedRequest({"epsilon": 0.2}, prompt[-1]).extra_args()} if i % 2 else ours
        for i, prompt in enumerate(prompts)
    ]
    params[4] = {**stop, "ignore_eos": True}  # and nothing, not the marker either, stops this one
    outputs = cramped.generate([prompt[:-1] for prompt in prompts], params)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    assert tokens[0] == tokens[2] == [vocabulary.marker]
    assert tokens[4] == [vocabulary.marker] * 9
    for i in (1, 3, 5):
        assert tokens[i][0] == prompts[i][-1]
        assert vocabulary.marker not in tokens[i][1:]


def test_requests_of_the_largest_size_keep_their_drafts(cramped: BlendedEngine) -> None:
    """`model_length` is enough for every last block, also while another sequence is a block behind."""
    prompts = prompts_of([PROMPT] * 32, seed=4)
    preempted = cramped.preemptions
    rollouts = [r for i in range(0, 32, 2) for r in cramped.rollouts(prompts[i : i + 2], 0.2, RESPONSE)]
    assert cramped.preemptions == preempted
    assert sum(rollout.resubmitted for rollout in rollouts) == 0
    assert sum(len(rollout.token_ids) == RESPONSE for rollout in rollouts) > 5


def test_a_request_beyond_the_largest_size_is_an_error(cramped: BlendedEngine) -> None:
    """vLLM would skip the student for the whole batch and go on with gaps in its KV cache: rollouts of a wrong
    π_S, silently. (The last test here: the engine is of no use afterwards.)
    """
    prompts = prompts_of([PROMPT + 8] * 24, seed=5)
    with pytest.raises(RuntimeError, match="max_model_len"):
        cramped.rollouts(prompts, 0.2, RESPONSE)
