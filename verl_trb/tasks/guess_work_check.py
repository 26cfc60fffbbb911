"""Guess, work, check: a task on which a model has to recover from errors of its own.

Prompt: a digit, six pairs of letters and `=`, e.g. `3ABDCFGBAHEEF=`. Each letter is one of four fixed permutations
of the digits (E to H are A to D again); two of them, one after the other, make a block. Response: a block
`s c1 x c2 y m` for each pair, then `.` (37 tokens): the letters with the values after them, between a sign and a mark.
Where the pair is of E to H the sign is a guess, made before the work, whether the block's last value will be 5 or more
(`+` or `-`), and the mark says whether it was wrong (`*`) or right (`,`). Elsewhere the sign is `=` and the mark `,`.

A wrong guess costs nothing if it is marked. So whoever cannot guess (the student) must learn to mark, on prefixes that
whoever guesses right (the teacher) hardly ever makes: the case for a student's own rollouts.

This file holds the task only (no torch): prompts, ground truth, reward, targets, settings, rows of verl's data files.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from verl_trb.tasks.table_walk import DIGITS, END_OF_PROMPT, EOS, TABLES
from verl_trb.tasks.toy import ModelShape, Sft, Target, ToySettings, data_row

PLAIN, GUESSED = "ABCD", "EFGH"
LETTERS = PLAIN + GUESSED
SIGN, HIGH, LOW = "=", "+", "-"
RIGHT, WRONG = ",", "*"
CHARACTERS = (*DIGITS, *LETTERS, SIGN, HIGH, LOW, RIGHT, WRONG, EOS)
BLOCKS, BLOCK_LENGTH = 6, 6
FIRST_GUESS = 2  # blocks before it are plain: the student's rollouts can go wrong before the first guess
PROMPT_LENGTH = 1 + 2 * BLOCKS + 1
RESPONSE_LENGTH = BLOCK_LENGTH * BLOCKS + 1
DATA_SOURCE = "guess_work_check"
SELECTION_SOURCE = "guess_work_check_selection"
RECOVERY_SOURCE = "guess_work_check_recovery"
TABLE = {letter: TABLES[PLAIN[index % 4]] for index, letter in enumerate(LETTERS)}
"""TABLE[letter][value] is the next value."""


@dataclass(frozen=True)
class Defects:
    """What is wrong with the responses a model is trained on.

    flipped: probability that a response has wrong guesses, at a rate drawn for each response from U(*flip_rates).
    unmarked: probability that a wrong guess is not marked.
    junk: probability, before each block after the first, that the rest of the response becomes random characters.
    learn_flipped: the wrong guesses themselves are learned, not only what follows them.
    sign_weight: weight of a guess in the loss; other tokens have 1.
    """

    flipped: float = 0.0
    flip_rates: tuple[float, float] = (0.0, 1.0)
    unmarked: float = 0.0
    junk: float = 0.0
    learn_flipped: bool = False
    sign_weight: float = 1.0


SETTINGS = ToySettings(
    teacher=ModelShape(hidden_size=96, intermediate_size=256, layers=3, heads=3, kv_heads=1),
    student=ModelShape(hidden_size=64, intermediate_size=176, layers=2, heads=2, kv_heads=1),
    # Guesses right, and marks a wrong guess that others have made.
    teacher_sft=Sft(
        steps=600,
        lr=4e-3,
        defects=Defects(flipped=0.6, flip_rates=(0.0, 0.8), sign_weight=4.0),
        batch_size=32,
        seed=1,
    ),
    # Guesses at random, marks too few of its errors, and turns to junk.
    student_sft=Sft(
        steps=450,
        lr=3e-3,
        defects=Defects(flipped=1.0, flip_rates=(0.5, 0.5), unmarked=0.7, junk=0.25, learn_flipped=True),
        batch_size=64,
        seed=1,
    ),
)


def random_prompt(rng: random.Random) -> str:
    """One prompt of PROMPT_LENGTH characters; from the third block on half of the blocks have a guess."""
    pairs = [
        "".join(rng.choices(GUESSED if block >= FIRST_GUESS and rng.random() < 0.5 else PLAIN, k=2))
        for block in range(BLOCKS)
    ]
    return rng.choice(DIGITS) + "".join(pairs) + END_OF_PROMPT


def solve(prompt: str) -> str:
    """The correct response to `prompt` in which every guess is right, without the final `.`.

    Raises ValueError when `prompt` is not a digit, pairs of letters (A to D or E to H) and `=`.
    """
    value, letters, end = prompt[:1], prompt[1:-1], prompt[-1:]
    pairs = [letters[place : place + 2] for place in range(0, len(letters), 2)]
    known = all(len(pair) == 2 and (set(pair) <= set(PLAIN) or set(pair) <= set(GUESSED)) for pair in pairs)
    if not value or value not in DIGITS or end != END_OF_PROMPT or not known:
        raise ValueError(f"{prompt!r} is not a prompt: a digit, pairs of letters of A to D or of E to H, then '='.")
    response = ""
    for pair in pairs:
        first, second = pair[0], pair[1]
        middle = TABLE[first][int(value)]
        value = TABLE[second][int(middle)]
        response += _sign(first, value) + first + middle + second + value + RIGHT
    return response


def _sign(letter: str, value: str) -> str:
    if letter in PLAIN:
        return SIGN
    return HIGH if int(value) >= 5 else LOW


def marked(block: str, right: str) -> str | None:
    """`right`, a correct block, with the guess of `block` and its mark; None if `block` has no such sign."""
    sign = block[:1]
    if sign == right[0]:
        return right
    if right[0] == SIGN or sign not in (HIGH, LOW):
        return None
    return sign + right[1:-1] + WRONG


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None
) -> float:
    """verl's reward function: 1.0 if all work and every mark is right, with or without the final `.`, else 0.0.

    A row of RECOVERY_SOURCE counts the block alone whose wrong guess its prompt has: `ground_truth` is what is left of
    that block.
    """
    solution = solution_str.removesuffix(EOS)
    if data_source == RECOVERY_SOURCE:
        return float(solution.startswith(ground_truth))
    truth = ground_truth.removesuffix(EOS)
    starts = range(0, max(len(truth), len(solution)), BLOCK_LENGTH)
    pairs = [(solution[s : s + BLOCK_LENGTH], truth[s : s + BLOCK_LENGTH]) for s in starts]
    return float(all(right and block == marked(block, right) for block, right in pairs))


def make_target(prompt: str, defects: Defects, rng: random.Random) -> Target:
    """The response to learn, of RESPONSE_LENGTH characters, with the weight of each in the loss."""
    truth = solve(prompt)
    rate = rng.uniform(*defects.flip_rates) if rng.random() < defects.flipped else 0.0
    text, weights = "", []
    for start in range(0, len(truth), BLOCK_LENGTH):
        if start and rng.random() < defects.junk:
            text += "".join(rng.choices(CHARACTERS[:-1], k=len(truth) - start))
            weights += [1.0] * (len(truth) - start)
            break
        block = truth[start : start + BLOCK_LENGTH]
        guess = block[0] != SIGN
        weight = defects.sign_weight if guess else 1.0
        if guess and rng.random() < rate:
            mark = RIGHT if rng.random() < defects.unmarked else WRONG
            block = (LOW if block[0] == HIGH else HIGH) + block[1:-1] + mark
            weight = weight if defects.learn_flipped else 0.0
        text += block
        weights += [weight] + [1.0] * (BLOCK_LENGTH - 1)
    return Target(text + EOS, [*weights, 1.0])


def make_rows(num_train: int, num_val: int, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of verl's train and validation files; no prompt occurs twice in either, or in both.

    Of four validation rows two report (DATA_SOURCE), one is for choosing settings (SELECTION_SOURCE), and one is of
    RECOVERY_SOURCE: its prompt goes on to a wrong guess in the third block, and its truth is the rest of that block.
    """
    rng = random.Random(seed)
    prompts: dict[str, None] = {}  # an ordered set
    while len(prompts) < num_train + num_val:
        prompts[random_prompt(rng)] = None
    ordered = list(prompts)
    train = [data_row(DATA_SOURCE, p, solve(p), i, "train") for i, p in enumerate(ordered[num_val:])]
    return train, [_val_row(index, prompt) for index, prompt in enumerate(ordered[:num_val])]


def _val_row(index: int, prompt: str) -> dict[str, Any]:
    source = (DATA_SOURCE, SELECTION_SOURCE, DATA_SOURCE, RECOVERY_SOURCE)[index % 4]
    truth = solve(prompt)
    if source == RECOVERY_SOURCE:
        letters = 1 + 2 * FIRST_GUESS
        upper = prompt[letters : letters + 2].translate(str.maketrans(PLAIN, GUESSED))
        prompt = prompt[:letters] + upper + prompt[letters + 2 :]
        truth = solve(prompt)
        start = BLOCK_LENGTH * FIRST_GUESS
        wrong = LOW if truth[start] == HIGH else HIGH
        prompt, truth = prompt + truth[:start] + wrong, truth[start + 1 : start + BLOCK_LENGTH - 1] + WRONG
    return data_row(source, prompt, truth, index, "val")
