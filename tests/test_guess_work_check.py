"""Guess, work, check: ground truth, reward, what the models are trained on, and the data that show recovery."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoConfig, AutoTokenizer

from verl_trb.tasks import guess_work_check as task
from verl_trb.tasks.guess_work_check import Defects, compute_score, make_target, random_prompt, solve
from verl_trb.tasks.prepare import prepare
from verl_trb.tasks.toy import Sft
from verl_trb.tasks.toy_models import vocabulary


def answer(prompt: str, guesses: list[str] | None = None) -> str:
    """An oracle from the definition: the right work, and a mark after each of `guesses` (by default all right)."""
    value, text = int(prompt[0]), ""
    for block in range(6):
        first, second = prompt[1 + 2 * block : 3 + 2 * block]
        middle = int(task.TABLES[chr((ord(first) - ord("A")) % 4 + ord("A"))][value])
        value = int(task.TABLES[chr((ord(second) - ord("A")) % 4 + ord("A"))][middle])
        truth = "=" if first < "E" else "+" if value > 4 else "-"
        guess = truth if guesses is None or first < "E" else guesses[block]
        text += f"{guess}{first}{middle}{second}{value}{',' if guess == truth else '*'}"
    return text


def test_ground_truth_is_the_definitions() -> None:
    rng = random.Random(3)
    for _ in range(200):
        prompt = random_prompt(rng)
        assert len(prompt) == task.PROMPT_LENGTH and solve(prompt) == answer(prompt)
    # Cached models and published results depend on the permutations.
    assert solve("3ABDCFGBAHEEF=") == answer("3ABDCFGBAHEEF=") and len(solve("3ABDCFGBAHEEF=")) == 36


@pytest.mark.parametrize("prompt", ["", "=", "AB=", "9AE=", "9A=", "9AB", "9AI="])
def test_solve_refuses_what_is_no_prompt(prompt: str) -> None:
    with pytest.raises(ValueError, match="is not a prompt"):
        solve(prompt)


def test_guesses_begin_with_the_third_block_in_half_of_the_blocks() -> None:
    rng = random.Random(1)
    prompts = [random_prompt(rng) for _ in range(2000)]
    shares = [sum(p[1 + 2 * block] in "EFGH" for p in prompts) / len(prompts) for block in range(6)]
    assert shares[:2] == [0, 0]
    assert all(abs(share - 0.5) < 4.5 * 0.25**0.5 / 2000**0.5 for share in shares[2:])  # error rate 3e-5, seed fixed


def test_a_marked_wrong_guess_is_right_and_everything_else_is_wrong() -> None:
    prompt = "3ABDCFGBAHEEF="  # guesses in blocks 3, 5 and 6
    truth = solve(prompt)

    def score(response: str) -> float:
        return compute_score(task.DATA_SOURCE, response, truth, {})

    for guesses in (a + b + c for a in "+-" for b in "+-" for c in "+-"):
        right = answer(prompt, ["", "", guesses[0], "", guesses[1], guesses[2]])
        assert score(right) == score(right + ".") == 1.0
        for place in range(len(right)):
            for other in task.CHARACTERS:
                if other != right[place] and place % 6:  # signs are free, if the mark fits
                    assert score(right[:place] + other + right[place + 1 :]) == 0.0
        for block in (2, 4, 5):  # the other guess, with the mark of this one
            flipped = "-" if right[6 * block] == "+" else "+"
            assert score(right[: 6 * block] + flipped + right[6 * block + 1 :]) == 0.0
            assert score(right[: 6 * block] + "=" + right[6 * block + 1 :]) == 0.0
    for block in (0, 1, 3):  # no guess where none is asked
        assert score(truth[: 6 * block] + "+" + truth[6 * block + 1 :]) == 0.0
    for malformed in ("", ".", truth[:-1], truth + ",", truth + truth, truth[6:], truth + ".."):
        assert score(malformed) == 0.0, malformed


def test_defects_have_their_rates_and_weights() -> None:
    rng = random.Random(0)
    defects = Defects(flipped=1.0, flip_rates=(0.3, 0.5), unmarked=0.7, sign_weight=4.0)
    guesses = wrong = unmarked = 0
    for _ in range(2000):
        prompt = random_prompt(rng)
        target, truth = make_target(prompt, defects, rng), solve(prompt)
        assert target.text[-1] == "." and len(target.text) == len(target.weights) == task.RESPONSE_LENGTH
        for start in range(0, 36, 6):
            block, right = target.text[start : start + 6], truth[start : start + 6]
            weights = target.weights[start : start + 6]
            assert block[1:5] == right[1:5] and weights[1:] == [1.0] * 5
            if right[0] == "=":
                assert block == right and weights[0] == 1.0
                continue
            guesses += 1
            wrong += block[0] != right[0]
            unmarked += block[0] != right[0] and block[5] == ","
            assert weights[0] == (4.0 if block[0] == right[0] else 0.0)
            assert block[0] != right[0] or block[5] == ","
    assert abs(wrong / guesses - 0.4) < 4.5 * (0.4 * 0.6 / guesses) ** 0.5 + 0.01  # the rate is shared in a response
    assert abs(unmarked / wrong - 0.7) < 4.5 * (0.7 * 0.3 / wrong) ** 0.5
    learned = make_target("3ABDCFGBAHEEF=", replace(defects, flip_rates=(1.0, 1.0), learn_flipped=True), rng)
    assert [learned.weights[6 * block] for block in range(6)] == [1, 1, 4, 1, 4, 4]


def test_junk_keeps_a_correct_beginning_and_the_length() -> None:
    rng = random.Random(0)
    clean = 0
    for _ in range(2000):
        prompt = random_prompt(rng)
        target = make_target(prompt, Defects(junk=0.25), rng)
        assert len(target.text) == 37 and target.text.index(".") == 36 and target.text[:6] == solve(prompt)[:6]
        assert target.weights == [1.0] * 37
        clean += target.text[:-1] == solve(prompt)
    share = 0.75**5
    assert abs(clean / 2000 - share) < 4.5 * (share * (1 - share) / 2000) ** 0.5


def test_data_report_select_and_show_recovery() -> None:
    train, val = task.make_rows(256, 128, seed=0)
    assert Counter(row["data_source"] for row in train) == {task.DATA_SOURCE: 256}
    counts = {task.DATA_SOURCE: 64, task.SELECTION_SOURCE: 32, task.RECOVERY_SOURCE: 32}
    assert Counter(row["data_source"] for row in val) == counts
    assert len({row["prompt"][0]["content"] for row in train + val}) == 256 + 128
    signs = Counter()
    for row in val:
        prompt, truth = row["prompt"][0]["content"], row["reward_model"]["ground_truth"]
        if row["data_source"] != task.RECOVERY_SOURCE:
            assert truth == answer(prompt)
            continue
        question, begun = prompt[:14], prompt[14:]
        assert question[5] in "EFGH", "the third block has a guess"
        flip = "-" if answer(question)[12] == "+" else "+"
        right = answer(question, ["", "", flip, *answer(question)[18::6]])
        assert begun == right[:13] and truth == right[13:18] and truth[-1] == "*"
        signs[flip] += 1
        assert compute_score(task.RECOVERY_SOURCE, right[13:] + ".", truth, {}) == 1.0
        assert compute_score(task.RECOVERY_SOURCE, truth + "junk", truth, {}) == 1.0, "only this block counts"
        assert compute_score(task.RECOVERY_SOURCE, truth[:-1] + ",", truth, {}) == 0.0
        assert compute_score(task.RECOVERY_SOURCE, truth[:-1], truth, {}) == 0.0
    assert min(signs["+"], signs["-"]) > 5


def test_its_models_are_made_like_the_other_tasks(tmp_path: Path) -> None:
    tiny = replace(
        task.SETTINGS,
        teacher_sft=Sft(steps=2, lr=1e-3, defects=task.SETTINGS.teacher_sft.defects, batch_size=4),
        student_sft=Sft(steps=2, lr=1e-3, defects=task.SETTINGS.student_sft.defects, batch_size=4),
        num_train=16,
        num_val=16,
    )
    made = prepare("guess_work_check", tmp_path, settings=tiny)
    for folder in (made.student, made.teacher):
        tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
        assert len(tokenizer) == config.vocab_size == len(vocabulary(task))
        assert tokenizer.eos_token == "."
        assert set(tokenizer.tokenize("0A=+-,*")) == set("0A=+-,*")
    rows = pq.read_table(made.val_file).to_pylist()
    assert rows == task.make_rows(16, 16, 0)[1]


@pytest.mark.slow
def test_the_real_teacher_recovers_and_the_real_student_does_not(tmp_path: Path) -> None:
    import json

    made = prepare("guess_work_check", tmp_path)
    accuracy = json.loads((made.student.parent / "accuracy.json").read_text())
    assert accuracy["teacher"][task.DATA_SOURCE] > 0.85 and accuracy["teacher"][task.RECOVERY_SOURCE] > 0.95
    assert accuracy["student"][task.DATA_SOURCE] < 0.15 and accuracy["student"][task.RECOVERY_SOURCE] < 0.4
