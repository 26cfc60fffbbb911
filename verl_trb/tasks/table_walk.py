"""Table walk: follow eight fixed permutations of the digits, one letter at a time.

Prompt: a start digit, twelve letters and `=`, e.g. `9EFAHDACBFHDG=`. Response: each letter followed by the
running value, then `.`, which ends the sequence: `E1F6A8...G6.` (25 tokens). One character is one token. The
reward is an exact match of the whole response, so errors compound and lucky guesses count for nothing.

The teacher is trained on correct responses. The student is trained on junk too: before each step after the first,
with a small probability, the rest of the response becomes random characters. It ends up knowing the tables, but its
rollouts turn into junk that the teacher has never seen: the case for trust-region blending.

This file holds the task only (no torch): prompts, ground truth, reward, targets, settings, rows of verl's data files.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from verl_trb.tasks.toy import ModelShape, Sft, Target, ToySettings, data_row

DIGITS = "0123456789"
LETTERS = "ABCDEFGH"
END_OF_PROMPT = "="
EOS = "."
CHARACTERS = (*DIGITS, *LETTERS, END_OF_PROMPT, EOS)
STEPS = 12
PROMPT_LENGTH = 1 + STEPS + 1
RESPONSE_LENGTH = 2 * STEPS + 1
DATA_SOURCE = "table_walk"
SELECTION_SOURCE = "table_walk_selection"


def _permutations(seed: int = 20260529) -> dict[str, str]:
    rng = random.Random(seed)
    return {letter: "".join(rng.sample(DIGITS, len(DIGITS))) for letter in LETTERS}


TABLES: dict[str, str] = _permutations()
"""TABLES[letter][value] is the next value: fixed for ever, they are what the models know."""


@dataclass(frozen=True)
class Defects:
    """What is wrong with the responses a model is trained on.

    junk: probability, before each step after the first, that the rest of the response becomes random characters.
    """

    junk: float = 0.0


SETTINGS = ToySettings(
    teacher=ModelShape(hidden_size=128, intermediate_size=352, layers=4, heads=4, kv_heads=2),
    student=ModelShape(hidden_size=64, intermediate_size=176, layers=2, heads=2, kv_heads=1),
    teacher_sft=Sft(steps=140, lr=5e-3, defects=Defects(), seed=1),
    student_sft=Sft(steps=420, lr=5e-3, defects=Defects(junk=0.12), batch_size=64, seed=1),
)


def random_prompt(rng: random.Random) -> str:
    """One prompt of PROMPT_LENGTH characters."""
    return rng.choice(DIGITS) + "".join(rng.choices(LETTERS, k=STEPS)) + END_OF_PROMPT


def solve(prompt: str) -> str:
    """The correct response to `prompt`, without the final `.`.

    Raises ValueError when `prompt` is not a digit, letters A to H and `=`.
    """
    value, letters, end = prompt[:1], prompt[1:-1], prompt[-1:]
    if not value or value not in DIGITS or end != END_OF_PROMPT or any(c not in LETTERS for c in letters):
        raise ValueError(f"{prompt!r} is not a table walk prompt: a digit, letters A to H, then '='.")
    response = ""
    for letter in letters:
        value = TABLES[letter][int(value)]
        response += letter + value
    return response


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None
) -> float:
    """verl's reward function: 1.0 for exactly the right response, with or without its `.`, else 0.0.

    verl decodes without special tokens, so the `.` (the EOS) is normally gone already.
    """
    return float(solution_str.removesuffix(EOS) == ground_truth.removesuffix(EOS))


def make_target(prompt: str, defects: Defects, rng: random.Random) -> Target:
    """The response to learn, of RESPONSE_LENGTH characters."""
    response = solve(prompt)
    for step in range(1, STEPS):
        if rng.random() < defects.junk:
            junk = rng.choices(DIGITS + LETTERS, k=len(response) - 2 * step)
            response = response[: 2 * step] + "".join(junk)
            break
    return Target(response + EOS, [1.0] * RESPONSE_LENGTH)


def make_rows(num_train: int, num_val: int, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of verl's train and validation files; no prompt occurs twice in either, or in both.

    Every second validation row is of source SELECTION_SOURCE: settings are chosen on those and reported on the others.
    """
    rng = random.Random(seed)
    prompts: dict[str, None] = {}  # an ordered set
    while len(prompts) < num_train + num_val:
        prompts[random_prompt(rng)] = None
    ordered = list(prompts)
    return _rows(ordered[num_val:], "train"), _rows(ordered[:num_val], "val")


def _rows(prompts: list[str], split: str) -> list[dict[str, Any]]:
    sources = [SELECTION_SOURCE if split == "val" and index % 2 else DATA_SOURCE for index in range(len(prompts))]
    return [data_row(sources[i], prompt, solve(prompt), i, split) for i, prompt in enumerate(prompts)]
