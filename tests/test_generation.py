"""`generate_blended` against scripted engines: what it submits, what it keeps, when it goes on and when it stops.

The scripts are the coroutine that the function takes; the real engine drives it in test_engine_*.py.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from verl_trb.rollout.generation import MAX_STALLED, Answer, Rollout, generate_blended
from verl_trb.rollout.request import FORCED, PARAMS, POLICY, BlendedRequest

MARKER, EOS = 0, 1
GUIDED = {"epsilon": 0.1}
PROMPT = [11, 12, 13]


@dataclass
class Script:
    """An engine that answers with prepared continuations, one a request, and remembers what it was asked."""

    continuations: Sequence[Sequence[int]]
    asked: list[tuple[list[int], BlendedRequest, int, int]] = field(default_factory=list)

    async def __call__(self, prefix: list[int], request: BlendedRequest, budget: int, round_: int) -> Answer:
        tokens = [request.forced_token, *self.continuations[len(self.asked)]][:budget]
        self.asked.append((prefix, request, budget, round_))
        reason = "stop" if tokens[-1] in (MARKER, EOS) else "length"
        return Answer(tokens, [0.0, *(-float(token) for token in tokens[1:])], reason, raw=round_)


def generate(submit: Script, max_tokens: int, prompt: Sequence[int] = PROMPT) -> Rollout:
    return asyncio.run(generate_blended(submit, prompt, max_tokens, GUIDED, MARKER, [EOS]))


def test_the_last_prompt_token_is_forced_and_stripped() -> None:
    script = Script([[5, 6, EOS]])
    rollout = generate(script, 10)
    assert rollout == Rollout([5, 6, EOS], [-5.0, -6.0, -1.0], "stop", resubmitted=0, raw=0)
    assert script.asked == [([11, 12], BlendedRequest(GUIDED, 13), 11, 0)]  # one more token than the response


def test_the_token_limit_ends_a_rollout() -> None:
    rollout = generate(Script([[5, 6, 7, 8, 9]]), 3)
    assert (rollout.token_ids, rollout.stop_reason, rollout.resubmitted) == ([5, 6, 7], "length", 0)


def test_a_marker_is_dropped_and_the_rest_resubmitted() -> None:
    script = Script([[5, 6, MARKER], [MARKER], [7, MARKER], [8, EOS]])
    rollout = generate(script, 9)
    assert rollout == Rollout([5, 6, 7, 8, EOS], [-5.0, -6.0, -7.0, -8.0, -1.0], "stop", 3, raw=3)
    assert script.asked == [
        ([11, 12], BlendedRequest(GUIDED, 13), 10, 0),
        ([11, 12, 13, 5], BlendedRequest(GUIDED, 6), 8, 1),
        ([11, 12, 13, 5], BlendedRequest(GUIDED, 6), 8, 2),
        ([11, 12, 13, 5, 6], BlendedRequest(GUIDED, 7), 7, 3),
    ]


def test_any_interruptions_give_the_uninterrupted_rollout() -> None:
    """Cut one sequence at random places: its tokens, log-probabilities and length do not change."""
    draw = random.Random(0)
    for _ in range(200):
        length = draw.randrange(1, 30)
        sequence = [draw.randrange(2, 50) for _ in range(length - 1)] + [draw.choice([EOS, 9])]
        continuations, position = [], 0
        while position < length:
            step = draw.randrange(0, 6)
            part = sequence[position : position + step]
            position += step
            continuations.append(part + [MARKER] if position < length else part)
        rollout = generate(Script(continuations), length)
        assert rollout.token_ids == sequence
        assert rollout.logprobs == [-float(token) for token in sequence]
        assert rollout.resubmitted == len(continuations) - 1


def test_an_answer_without_tokens_ends_the_rollout() -> None:
    """verl aborts requests by answering with what there is, perhaps nothing."""

    async def aborted(*_: object) -> Answer:
        return Answer([], [], "aborted")

    rollout = asyncio.run(generate_blended(aborted, PROMPT, 5, None, MARKER, [EOS]))
    assert (rollout.token_ids, rollout.logprobs, rollout.stop_reason) == ([], [], "aborted")


def test_an_engine_that_never_gets_on_is_an_error() -> None:
    script = Script([[MARKER]] * (MAX_STALLED + 5))
    with pytest.raises(RuntimeError, match="max_model_len"):
        generate(script, 5)
    assert len(script.asked) == MAX_STALLED


def test_progress_resets_the_count_of_stalled_rounds() -> None:
    idle = [[MARKER]] * (MAX_STALLED - 1)
    assert generate(Script([*idle, [5, MARKER], *idle, [EOS]]), 9).token_ids == [5, EOS]


@pytest.mark.parametrize("prompt", [[], [11]])
def test_short_prompts_are_refused(prompt: list[int]) -> None:
    with pytest.raises(ValueError, match=f"at least two tokens, got {len(prompt)}"):
        generate(Script([]), 5, prompt)


@pytest.mark.parametrize("last", [EOS, MARKER])
def test_prompts_that_end_like_a_response_are_refused(last: int) -> None:
    with pytest.raises(ValueError, match=f"ends with token {last}, which ends a response"):
        generate(Script([]), 5, [11, last])


@pytest.mark.parametrize("params", [GUIDED, {"k": 25, "temperature": 0.6}, {}, None])
def test_requests_survive_extra_args(params: dict[str, float] | None) -> None:
    request = BlendedRequest(params, forced_token=7)
    assert request.extra_args() == {PARAMS: params, FORCED: 7, POLICY: None}
    for policy in (None, "teacher"):
        request = BlendedRequest(params, 7, policy, trace=policy)
        assert BlendedRequest.read(request.extra_args()) == request


def test_requests_of_others_are_told_apart() -> None:
    for foreign in (None, {}, {"other": 1}, {PARAMS: GUIDED}):
        assert BlendedRequest.read(foreign) is None
