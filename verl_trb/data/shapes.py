r"""Question and answer of a row, in any of the shapes that math data sets circulate in.

    prompt + reward_model         verl's own: chat messages, and {"ground_truth": ...}
    messages or conversations     a chat; the answer is in its own column, or in the assistant's last \boxed{}
    question + answer             under any of the names below; an answer may be a solution that ends with
                                  "#### 42" (GSM8K) or holds \boxed{42} (MATH)

Column names count without case. A row that cannot be used gives a `Fault`, in words.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from verl_trb.errors import UserError
from verl_trb.rewards.answers import last_boxed, tidy

QUESTIONS = ("problem", "question", "prompt", "query", "instruction")
ANSWERS = ("answer", "final_answer", "expected_answer", "ground_truth", "target")
SOLUTIONS = ("solution", "response", "output", "generation")
CHATS = ("messages", "conversations", "conversation")
IDS = ("id", "unique_id", "problem_id", "question_id", "index")
USER, ASSISTANT = {"user", "human"}, {"assistant", "gpt", "model"}

# Instructions that other projects wrap around a question; the system prompt says it here.
_WRAPPERS = (
    re.compile(
        r"\s*Solve the following math problem step by step\. The last line of your response should be of the form "
        r"Answer: \$?Answer \(without quotes\) where \$?Answer is the answer to the problem\.\s*(?P<question>.*?)"
        r"\s*Remember to put your answer on its own line after \"Answer:\"\.\s*",
        re.DOTALL,
    ),
    re.compile(
        r"(?P<question>.*?)\s*Let's think step by step and output the final answer "
        r"(?:after \"####\"|within \\boxed\{\})\.\s*",
        re.DOTALL,
    ),
    re.compile(
        r"(?P<question>.*?)\s*Please reason step by step, and put your final answer within \\boxed\{\}\.\s*", re.DOTALL
    ),
)


class Fault(Exception):
    """Why a row cannot be used, in a few words."""


@dataclass(frozen=True)
class Shape:
    """Which columns of a file hold what; None where the shape has no such column."""

    question: str | None = None
    answer: str | None = None
    solution: str | None = None
    chat: str | None = None
    reward_model: str | None = None
    id: str | None = None

    def __str__(self) -> str:
        return ", ".join(f"{role} from {column!r}" for role, column in vars(self).items() if column)


@dataclass(frozen=True)
class Example:
    """question and answer, both stripped and not empty; id: the set's own, or None."""

    question: str
    answer: str
    id: str | None


def find_shape(where: str, row: dict[str, Any], question: str | None = None, answer: str | None = None) -> Shape:
    """The shape of the file whose first row is given; `question` and `answer` name columns where they are known.

    Raises UserError that lists the columns found and expected.
    """
    columns = {name.lower(): name for name in row if isinstance(name, str)}

    def first(names: tuple[str, ...]) -> str | None:
        return next((columns[name] for name in names if name in columns), None)

    for asked in (question, answer):
        if asked is not None and asked not in row:
            raise UserError(f"{where} has no column {asked!r}; it has {', '.join(map(str, row)) or 'none'}.")
    identity = first(IDS)
    chat = first(CHATS)
    reward_model = columns.get("reward_model")
    solution = first(SOLUTIONS)
    if question is None:
        if reward_model and isinstance(row.get(columns.get("prompt", "")), list):
            extra = identity or ("extra_info" if isinstance(row.get("extra_info"), dict) else None)
            return Shape(chat=columns["prompt"], reward_model=reward_model, answer=answer, id=extra)
        if chat:
            return Shape(chat=chat, answer=answer or first(ANSWERS), solution=None, id=identity)
    question, answer = question or first(QUESTIONS), answer or first(ANSWERS)
    if question is None or not (answer or solution or reward_model):
        raise UserError(
            f"{where} has the columns {', '.join(map(str, row)) or 'none'}; expected are prompt and reward_model "
            f"(verl), {' or '.join(CHATS[:2])}, or one of {'/'.join(QUESTIONS)} with one of "
            f"{'/'.join((*ANSWERS, *SOLUTIONS[:1]))}; name yours with --question-column and --answer-column."
        )
    return Shape(question=question, answer=answer, solution=solution, reward_model=reward_model, id=identity)


def read_example(shape: Shape, row: dict[str, Any], context: str | None = None) -> Example:
    """Question, answer and id of a row; `context` names a column to put before the question. Raises Fault."""
    for column, value in row.items():
        if str(column).lower().startswith("image") and value:
            raise Fault("it needs an image")
    response = None
    if shape.chat:
        question, response = _read_chat(row.get(shape.chat))
    else:
        question = _text(row.get(shape.question or ""))
    question = _unwrapped(question)
    if not question:
        raise Fault("no question")
    if context and (before := _text(row.get(context))):
        question = f"{before}\n{question}"
    return Example(question, _answer(shape, row, response), _identity(shape, row))


def _read_chat(messages: Any) -> tuple[str, str | None]:
    """The one question of a chat, and the assistant's last message."""
    messages = _parsed(messages, "its chat is not a list of messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise Fault("its chat is not a list of messages")
    said: dict[str, list[str]] = {"user": [], "assistant": []}
    for message in messages:
        role = str(message.get("role") or message.get("from") or "").lower()
        speaker = "user" if role in USER else "assistant" if role in ASSISTANT else None
        if speaker:
            content = message.get("content") if message.get("content") is not None else message.get("value")
            said[speaker].append(_text(content))
    if len(said["user"]) != 1:
        raise Fault(f"a chat with {len(said['user'])} user messages" if said["user"] else "no question")
    return said["user"][0], said["assistant"][-1] if said["assistant"] else None


def _answer(shape: Shape, row: dict[str, Any], response: str | None) -> str:
    if shape.reward_model and shape.answer is None:
        reward_model = _parsed(row.get(shape.reward_model), "its reward_model is not a record")
        if not isinstance(reward_model, dict):
            raise Fault("its reward_model is not a record")
        given = reward_model.get("ground_truth")
    else:
        given = row.get(shape.answer) if shape.answer else None
    answer = gold_answer(_text(given))
    if answer:
        return answer
    text = response if response is not None else _text(row.get(shape.solution)) if shape.solution else None
    if text is None:
        raise Fault("no answer")
    answer = last_boxed(text) or (gold_answer(text) if "####" in text else "")
    if not answer:
        raise Fault("no boxed answer in its solution")
    return answer


def gold_answer(text: str) -> str:
    r"""The answer alone: what follows the last "####", else what the last `\boxed{}` holds, else the text, tidied."""
    if "####" in text:
        return tidy(text.rsplit("####", 1)[1]).replace(",", "")
    return last_boxed(text) or tidy(text)


def _identity(shape: Shape, row: dict[str, Any]) -> str | None:
    value = row.get(shape.id) if shape.id else None
    if isinstance(value, dict):  # verl's extra_info
        value = next((value[name] for name in ("id", "index") if value.get(name) is not None), None)
    return None if value is None or value == "" else str(value)


def _parsed(value: Any, fault: str) -> Any:
    """A value that some files hold as JSON text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise Fault(fault) from None


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(filter(None, map(_text, value)))
    if value is None or isinstance(value, dict):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of numbers with gaps
    return str(value).strip()


def _unwrapped(question: str) -> str:
    for wrapper in _WRAPPERS:
        if match := wrapper.fullmatch(question):
            question = match["question"]
    return question.strip()
