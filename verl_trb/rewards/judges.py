"""What runs inside the sandbox: one function a kind of answer, from a request to whether the answer is right.

Each maker imports what it needs and returns the judge; it is called once, before the sandbox is closed.
"""

import json
import logging
from collections.abc import Callable
from typing import Any

Judge = Callable[[dict[str, Any]], bool]


def make_math_judge() -> Judge:
    """math-verify 0.9.0. A request has `gold` and either `answer` (without delimiters) or `text` to search."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    latex, expression = LatexExtractionConfig(), ExprExtractionConfig()

    def judge(request: dict[str, Any]) -> bool:
        # Its own time limits are off: they need the main thread and cannot end a big-integer power.
        gold = parse(_boxed(request["gold"]), [latex], parsing_timeout=None)
        text = _boxed(request["answer"]) if "answer" in request else request["text"]
        answer = parse(text, [latex, expression], parsing_timeout=None)
        return bool(gold and answer and verify(gold, answer, timeout_seconds=None))

    return judge


def make_reasoning_gym_judge() -> Judge:
    """reasoning-gym's own verifiers. A request has `task`, `entry` (JSON) and `answer`; partial credit is none."""
    import reasoning_gym

    def judge(request: dict[str, Any]) -> bool:
        score = reasoning_gym.get_score_answer_fn(request["task"])
        return bool(score(request["answer"], json.loads(request["entry"])) >= 1.0)

    return judge


MAKERS: dict[str, Callable[[], Judge]] = {"math": make_math_judge, "reasoning_gym": make_reasoning_gym_judge}


def _boxed(answer: str) -> str:
    return "\\boxed{" + answer + "}"
