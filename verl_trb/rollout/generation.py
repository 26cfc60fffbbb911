"""One rollout as one or more engine requests: force the first token, strip it, resubmit after a marker.

Pure bookkeeping, independent of vLLM: `generate_blended` drives any coroutine that answers a request.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from verl_trb.rollout.request import BlendedRequest
from verl_trb.seeds import derive

# Rounds without a single token after which a request counts as stuck (one or two happen under preemption).
MAX_STALLED = 20


@dataclass
class Answer:
    """What the engine returned for one request: ids and log μ of equal length, and why it stopped."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    stop_reason: str | None
    raw: Any = None


@dataclass
class Rollout:
    """A finished rollout: the response without the forced token, and how often it was resubmitted."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop_reason: str | None = None
    resubmitted: int = 0
    raw: Any = None


Submit = Callable[[list[int], BlendedRequest, int, int], Awaitable[Answer]]


async def generate_blended(
    submit: Submit,
    prompt_ids: Sequence[int],
    max_tokens: int,
    params: dict[str, float] | None,
    marker: int,
    stop_ids: Sequence[int],
    policy: str | None = None,
    seed: int | None = None,
) -> Rollout:
    """Sample up to `max_tokens` tokens of μ after `prompt_ids`.

    Args:
        submit: coroutine (prefix_ids, request, max_tokens, round) → Answer; `prefix_ids` lacks its last token,
            which is `request.forced_token` and comes back as the first token of the answer.
        prompt_ids: at least two token ids.
        params: the rollout policy's parameters; None samples the student.
        marker: id that ends a request whose next π_S is unknown (after a preemption, for example).
        stop_ids: ids that end a rollout; a prompt must not end with one.
        policy: name of the rollout policy, None for the run's own.
        seed: of the rollout; each engine request gets one of its own that follows from it.

    Raises:
        ValueError: for a prompt the engine cannot sample exactly after.
        RuntimeError: when the engine makes no progress (its `max_model_len` is too small).
    """
    prompt = list(prompt_ids)
    if len(prompt) < 2:
        raise ValueError(f"a prompt needs at least two tokens, got {len(prompt)}: the engine forces the last one")
    if prompt[-1] in stop_ids or prompt[-1] == marker:
        raise ValueError(
            f"the prompt ends with token {prompt[-1]}, which ends a response: close the prompt with the chat "
            "template's generation prompt, or remove the token"
        )
    rollout, stalled = Rollout(), 0
    while True:
        prefix = prompt + rollout.token_ids
        own = None if seed is None else derive(seed, len(prefix), rollout.resubmitted)
        request = BlendedRequest(params, prefix[-1], policy, seed=own)
        budget = max_tokens - len(rollout.token_ids)
        answer = await submit(prefix[:-1], request, budget + 1, rollout.resubmitted)
        tokens, logprobs = list(answer.token_ids[1:]), list(answer.logprobs[1:])
        rollout.stop_reason, rollout.raw = answer.stop_reason, answer.raw
        ended_by_marker = bool(tokens) and tokens[-1] == marker
        if ended_by_marker:
            tokens.pop(), logprobs.pop()
        rollout.token_ids += tokens
        rollout.logprobs += logprobs
        if not ended_by_marker or len(rollout.token_ids) >= max_tokens:
            return rollout
        stalled = 0 if tokens else stalled + 1
        if stalled == MAX_STALLED:
            raise RuntimeError(
                f"the rollout engine returned nothing {MAX_STALLED} times in a row for one request: raise "
                "actor_rollout_ref.rollout.max_model_len, max_num_batched_tokens or the size of the KV cache"
            )
        rollout.resubmitted += 1
