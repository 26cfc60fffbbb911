r"""verl's reward function for math: 1.0 when math-verify finds the final answer equal to the ground truth, else 0.0.

    reward.custom_reward_function.path=pkg://verl_trb.rewards.math reward.custom_reward_function.name=compute_score

The answer is what the last `\boxed{}` holds, else what follows the last "Answer:", else whatever math-verify finds
in the last lines. Rows of reasoning-gym (`data_source` "reasoning_gym/TASK") go to that task's own verifier.
"""

from typing import Any, NamedTuple

from verl_trb.rewards.answers import final_answer
from verl_trb.rewards.keeper import DIED, TIME_LIMIT
from verl_trb.rewards.sandbox import Limits, ask

REASONING_GYM = "reasoning_gym/"
# Characters. An answer comes last; the longest gold answers of the sets in docs/data.md are a few hundred.
MAX_TEXT = 20_000
MAX_FREE_TEXT = 1_000
MAX_ANSWER = 2_000


class Verdict(NamedTuple):
    """score: 1.0 or 0.0. why: right, wrong, no answer, too long, time limit, or died (crashed, out of memory)."""

    score: float
    why: str


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    *,
    time_limit: float = Limits().seconds,
    memory_mb: int = Limits().memory_mb,
    workers: int = Limits().workers,
) -> float:
    """The score of one response, 1.0 or 0.0; never raises for what a response holds.

    time_limit (seconds), memory_mb and workers (answers judged at a time in one process) can be set with
    reward.custom_reward_function.reward_kwargs.
    """
    limits = Limits(time_limit, memory_mb, workers)
    return judge(data_source, solution_str, ground_truth, extra_info, limits).score


def judge(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    limits: Limits = Limits(),  # noqa: B008 - immutable
) -> Verdict:
    """The same, with the reason. Raises ValueError for a reasoning-gym row without its entry."""
    text = solution_str[-MAX_TEXT:]
    answer = final_answer(text)
    if data_source.startswith(REASONING_GYM):
        if not extra_info or "entry" not in extra_info:
            raise ValueError(f"A {data_source} row lacks extra_info.entry; prepare_data makes files that have it.")
        lines = text.strip().splitlines()
        request = {
            "task": data_source.removeprefix(REASONING_GYM),
            "entry": extra_info["entry"],
            "answer": answer if answer is not None else (lines[-1].strip() if lines else ""),
        }
        return _verdict(request["answer"], ask_for=("reasoning_gym", request), limits=limits)
    gold = str(ground_truth).strip()
    if answer is None:
        free = text[-MAX_FREE_TEXT:]
        return _verdict(free.strip(), ask_for=("math", {"gold": gold, "text": free}), limits=limits)
    if answer == gold:
        return Verdict(1.0, "right")
    return _verdict(answer, ask_for=("math", {"gold": gold, "answer": answer}), limits=limits)


def verifies_itself(gold: str, limits: Limits = Limits()) -> bool:  # noqa: B008 - immutable
    """Whether math-verify can parse a gold answer and finds it equal to itself, not only the same text."""
    return ask("math", {"gold": gold, "answer": gold, "parsed": True}, limits).verdict is True


def same_answer(gold: str, answer: str, limits: Limits = Limits()) -> bool:  # noqa: B008 - immutable
    """Whether math-verify finds two answers equal."""
    return ask("math", {"gold": gold, "answer": answer}, limits).verdict is True


def _verdict(answer: str, ask_for: tuple[str, dict[str, Any]], limits: Limits) -> Verdict:
    if not answer:
        return Verdict(0.0, "no answer")
    if len(answer) > MAX_ANSWER:
        return Verdict(0.0, "too long")
    outcome = ask(*ask_for, limits)
    why = outcome.failed if outcome.failed in (TIME_LIMIT, DIED) else "right" if outcome.verdict is True else "wrong"
    return Verdict(float(why == "right"), why)
