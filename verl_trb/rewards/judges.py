"""What runs inside the sandbox: one function a kind of request, from what it holds to a verdict (anything of JSON).

Each maker imports what it needs and returns the judge; it is called once, before the sandbox is closed.
"""

import asyncio
import importlib
import importlib.util
import inspect
import json
import logging
import re
from collections.abc import Callable
from typing import Any

_PERCENT = re.compile(r"\s*\\?%$")
PACKAGE, FILE = "pkg://", "file://"
FUNCTION = "function"
Judge = Callable[[dict[str, Any]], Any]


def make_math_judge() -> Judge:
    """math-verify 0.9.0. A request has `gold` and either `answer` (without delimiters) or `text` to search.

    math-verify compares what it cannot parse as text; a request with `parsed` true calls that wrong.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    latex, expression = LatexExtractionConfig(), ExprExtractionConfig()

    def judge(request: dict[str, Any]) -> bool:
        # Its own time limits are off: they need the main thread and cannot end a big-integer power.
        options: dict[str, Any] = {
            "parsing_timeout": None,
            "fallback_mode": "no_fallback" if request.get("parsed") else "first_match",
        }
        wanted, text = request["gold"], _boxed(request["answer"]) if "answer" in request else request["text"]
        if _PERCENT.search(wanted):  # which math-verify cannot parse inside a box: of a percentage the number counts
            wanted = _PERCENT.sub("", wanted)
            text = _boxed(_PERCENT.sub("", request["answer"])) if "answer" in request else text
        gold = parse(_boxed(wanted), [latex], **options)
        answer = parse(text, [latex, expression], **options)
        return bool(gold and answer and verify(gold, answer, timeout_seconds=None))

    return judge


def make_reasoning_gym_judge() -> Judge:
    """reasoning-gym's own verifiers. A request has `task`, `entry` (JSON) and `answer`; partial credit is none."""
    import reasoning_gym

    def judge(request: dict[str, Any]) -> bool:
        score = reasoning_gym.get_score_answer_fn(request["task"])
        return bool(score(request["answer"], json.loads(request["entry"])) >= 1.0)

    return judge


def make_function_judge(path: str, name: str) -> Judge:
    """A reward function of the user's, from a file or `pkg://MODULE`. A request holds its keyword arguments."""
    function = getattr(_module(path), name)

    def judge(request: dict[str, Any]) -> Any:
        score = function(**request["arguments"])
        return asyncio.run(score) if inspect.iscoroutine(score) else score

    return judge


MAKERS: dict[str, Callable[..., Judge]] = {
    "math": make_math_judge,
    "reasoning_gym": make_reasoning_gym_judge,
    FUNCTION: make_function_judge,
}


def _module(path: str) -> Any:
    if path.startswith(PACKAGE):
        return importlib.import_module(path.removeprefix(PACKAGE))
    spec = importlib.util.spec_from_file_location("reward_function", path.removeprefix(FILE))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _boxed(answer: str) -> str:
    return "\\boxed{" + answer + "}"
