"""Table walk: follow eight fixed permutations of the digits, one letter at a time.

Prompt: a start digit, twelve letters and `=`, e.g. `9EFAHDACBFHDG=`. Response: each letter followed by the
running value, then `.`, which ends the sequence: `E1F6A8...G6.` (25 tokens). One character is one token. The
reward is an exact match of the whole response, so errors compound and lucky guesses count for nothing.

This file holds the task only (no models, no torch): prompts, ground truth, reward, rows of verl's data files.
"""

from __future__ import annotations

import random
from typing import Any

DIGITS = "0123456789"
LETTERS = "ABCDEFGH"
END_OF_PROMPT = "="
EOS = "."
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
    return [
        {
            "data_source": SELECTION_SOURCE if split == "val" and index % 2 else DATA_SOURCE,
            "prompt": [{"role": "user", "content": prompt}],
            "ability": "table_walk",
            "reward_model": {"style": "rule", "ground_truth": solve(prompt)},
            "extra_info": {"index": index, "split": split},
        }
        for index, prompt in enumerate(prompts)
    ]
