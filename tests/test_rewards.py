"""Rewards: the final answer is found, math-verify is agreed with, and no answer can hang, flood or kill a process."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from omegaconf import OmegaConf

from verl_trb.rewards import sandbox
from verl_trb.rewards.answers import final_answer, last_boxed, tidy
from verl_trb.rewards.math import compute_score, judge, verifies_itself
from verl_trb.rewards.sandbox import Limits, Outcome, Pool

ROOT = Path(__file__).resolve().parent.parent
QUICK = Limits(seconds=1.0)
# For the keeper's start and a busy machine, on top of the limit.
GRACE = 8.0


# ------------------------------------------------------------------------------------------ the final answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{12}.", "12"),
        (r"\boxed{3}, no: \boxed{ -4 }", "-4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\left\{ 1, 2 \right\}}", r"\left\{ 1, 2 \right\}"),
        (r"\boxed{x_{\boxed{2}}}", r"x_{\boxed{2}}"),
        (r"\fbox{7}", "7"),
        (r"first $\boxed{1}$ and $\boxed{2}$", "1, 2"),
        (r"$\boxed{5}$. \boxed{5}", "5"),
        (r"\boxed{1} is wrong, I think it is \boxed{2}", "2"),
        (r"\boxed{8} and then \boxed{9", "8"),
        (r"\boxed{$34$}", "34"),
        (r"Answer: 9 but \boxed{8}", "8"),
        (r"\boxed{}", None),
        (r"\boxed{", None),
        ("Answer: 34", "34"),
        ("so\n**Final Answer:** $\\frac{1}{2}$.\n", r"\frac{1}{2}"),
        ("answer : \\(x+1\\)\n", "x+1"),
        ("Answer:\n\\[ 5 \\]", "5"),
        ("Answer: 1\nAnswer: 2", "2"),
        ("the answer is not known: 3", None),
        ("In my answer: nothing", None),
        ("", None),
    ],
)
def test_final_answer(text: str, answer: str | None):
    assert final_answer(text) == answer


@pytest.mark.parametrize("text", ["$1$", "**1**", "$$ 1 $$", r"\(1\)", "`1`.", " 1 ", "$**1**$."])
def test_tidy(text: str):
    assert tidy(text) == "1"


def test_tidy_keeps_what_is_not_a_pair():
    assert tidy("$1$ or $2$") == "$1$ or $2$"
    assert tidy(r"\$5") == r"\$5"


@pytest.mark.parametrize(
    "piece",
    [r"\boxed{", "{", "}", "answer ", "answer:", "Answer: \n", "$", " ", "\n", "\\", r"\boxed ", "**", ".", "a"],
)
def test_finding_the_answer_takes_linear_time(piece: str):
    def seconds(characters: int) -> float:
        text = piece * (characters // len(piece))
        start = time.process_time()
        final_answer(text)
        return time.process_time() - start

    seconds(1000)
    # Quadratic time would make a hundredfold of the first; 20 ms excuse a short measurement.
    assert seconds(200_000) < 30 * seconds(20_000) + 0.02


# ------------------------------------------------------------------------------------------ right and wrong

GOLDS = [
    "0", "-7", "34", "113", "1000000", "12345678901234567890123", "0.25", r"\frac{3}{4}", r"-\frac{\sqrt{2}}{2}",
    r"2\sqrt{3}+1", r"\pi", r"\frac{\pi}{6}", "x^2+2x+1", r"3(x-1)", "y=2x+3", r"\left(1,2\right)", r"(3, -4, 5)",
    r"[0, 1)", r"(-\infty, 2] \cup [3, \infty)", r"\{1, 2, 3\}", "1, 2", r"50^\circ", r"\text{Yes}", r"\text{(B)}",
    r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", "2+3i", r"\binom{10}{3}", "6!", r"e^{2}", r"\log_2 3", "10\\%",
]  # fmt: skip


@pytest.fixture(scope="module")
def math_verify() -> Callable[[str, str], bool]:
    """math-verify used directly, with its own search of the text and its own time limits."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    def right(gold: str, response: str) -> bool:
        parsed = parse(f"\\boxed{{{gold}}}", [LatexExtractionConfig()])
        return verify(parsed, parse(response, [LatexExtractionConfig(), ExprExtractionConfig()]))

    return right


@pytest.mark.parametrize("gold", GOLDS)
def test_every_gold_verifies_itself_and_no_other(gold: str, math_verify: Callable[[str, str], bool]):
    assert verifies_itself(gold)
    assert compute_score("math", f"Therefore the answer is $\\boxed{{{gold}}}$.", gold) == 1.0
    # The neighbours in the list have other values, all of them.
    for other in (GOLDS[GOLDS.index(gold) - 1], GOLDS[(GOLDS.index(gold) + 1) % len(GOLDS)]):
        response = f"Therefore $\\boxed{{{other}}}$."
        assert compute_score("math", response, gold) == float(math_verify(gold, response)) == 0.0


@pytest.mark.parametrize(
    ("response", "gold", "right"),
    [
        (r"\boxed{0.5}", r"\frac{1}{2}", True),
        (r"\boxed{\dfrac12}", "0.5", True),
        (r"\boxed{1,000}", "1000", True),
        (r"\boxed{x=34}", "34", True),
        (r"\boxed{2, 1}", "1, 2", True),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", True),
        (r"\boxed{34, 35}", "34", False),
        (r"\boxed{-34}", "34", False),
        (r"\boxed{3.4}", "34", False),
        (r"\boxed{(2,1)}", "(1,2)", False),
        (r"\boxed{x^2+2x}", "x^2+2x+1", False),
        ("The answer is 34.", "34", True),
        ("The answer is 35.", "34", False),
        ("34 is what I begin with.\n" + "and so on\n" * 200, "34", False),
        ("no number at all", "34", False),
    ],
)
def test_agrees_with_math_verify(response: str, gold: str, right: bool, math_verify: Callable[[str, str], bool]):
    assert compute_score("math", response, gold) == float(right)
    if len(response) < 1000:  # a shorter text is searched whole
        assert math_verify(gold, response) == right


@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [("10", r"10\%", 1), ("10%", r"10\%", 1), (r"10.0 \%", "10%", 1), ("11%", r"10\%", 0), (r"10\%", "10", 0)],
)
def test_of_a_percentage_the_number_counts(answer: str, gold: str, score: int):
    assert compute_score("math", f"\\boxed{{{answer}}}", gold) == score


def test_a_gold_that_math_verify_cannot_read_still_equals_itself():
    assert judge("math", r"\boxed{\foo\bar{}}", r"\foo\bar{}").why == "right"
    assert not verifies_itself(r"\foo\bar{}") and not verifies_itself("}{") and not verifies_itself("")


# ------------------------------------------------------------------------------------------ hostile answers

HOSTILE = {
    "tower": r"\boxed{9^{9^{9^9}}}",
    "factorial": r"\boxed{100000000!}",
    "deep braces": r"\boxed{" + "{" * 900 + "}" * 900 + "}",
    "deep roots": r"\boxed{" + r"\sqrt{" * 200 + "2" + "}" * 200 + "}",
    "deep fractions": r"\boxed{" + r"\frac{1}{1+" * 150 + "1" + "}" * 150 + "}",
    "deep brackets": r"\boxed{" + "(" * 900 + ")" * 900 + "}",
    "unbalanced": r"\boxed{((((((" + ")" * 3 + r"\}\}\left( }",
    "unbalanced answer": "Answer: }}}}{{{{",
    "open boxes": r"\boxed{" * 140_000,
    "a million digits": r"\boxed{" + "7" * 10**6 + "}",
    "a million letters": "x" * 10**6,
    "a million dollars": "$" * 10**6,
    "a million lines": "answer\n" * 150_000,
    "null bytes": "\\boxed{\x00\x00}",
    "null text": "\x00" * 1000,
    "lone surrogate": "\\boxed{\ud800}",
    "endless sum": r"\boxed{\sum_{n=1}^{10^{12}} \frac{1}{n^2+\sin n}}",
    "wide polynomial": r"\boxed{(x+1)^{100000}+x^{1000000}}",
    "code": r"\boxed{__import__('os').system('touch hostile_was_here')}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_is_wrong_in_bounded_time(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    compute_score("math", r"\boxed{1}", "2", time_limit=QUICK.seconds)  # the keeper has started
    start = time.monotonic()
    verdict = judge("math", HOSTILE[name], "34", limits=QUICK)
    assert time.monotonic() - start < QUICK.seconds + GRACE
    assert verdict.score == 0.0 and verdict.why in ("wrong", "no answer", "too long", "time limit", "died")
    assert not list(tmp_path.iterdir())
    assert judge("math", r"\boxed{34.0}", "34", limits=Limits(seconds=20.0)).score == 1.0


def test_the_time_limit_is_what_ends_a_tower_of_powers():
    start = time.monotonic()
    assert judge("math", HOSTILE["tower"], "34", limits=QUICK).why == "time limit"
    assert time.monotonic() - start >= QUICK.seconds


RIGHT = Outcome(verdict=True)


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool(("math",), memory_mb=256, workers=1)
    yield pool
    pool.close()


def the_keeper(pool: Pool) -> psutil.Process:
    keeper = pool.free.queue[-1]
    assert keeper is not None
    return psutil.Process(keeper.process.pid)


def test_the_judge_has_limits_on_memory_and_files(pool: Pool):
    assert pool.ask({"gold": "1", "answer": "1.0"}, 20.0) == RIGHT
    (judge_process,) = the_keeper(pool).children()
    lines = Path(f"/proc/{judge_process.pid}/limits").read_text().splitlines()
    limits = {line[:26].strip(): line[26:].split()[0] for line in lines[1:]}
    # Besides what it had mapped when it was forked.
    assert 256 * 2**20 < int(limits["Max address space"]) < 256 * 2**20 + 2 * 2**30
    assert limits["Max file size"] == limits["Max core file size"] == "0"
    assert limits["Max cpu time"] != "unlimited"


def test_more_memory_than_allowed_is_a_wrong_answer(pool: Pool):
    # 2^34 bits are 2 GiB.
    outcome = pool.ask({"gold": "1", "answer": "2^{2^{34}}"}, 20.0)
    assert outcome.verdict is not True and outcome.failed in ("", "raised", "died")
    assert pool.ask({"gold": "1", "answer": "1.0"}, 20.0) == RIGHT


def test_a_killed_judge_and_a_killed_keeper_are_replaced(pool: Pool):
    assert pool.ask({"gold": "1", "answer": "1.0"}, 20.0) == RIGHT
    the_keeper(pool).children()[0].kill()
    assert pool.ask({"gold": "1", "answer": "1.0"}, 20.0) in (RIGHT, Outcome(failed="died"))
    assert pool.ask({"gold": "1", "answer": "1.0"}, 20.0) == RIGHT
    the_keeper(pool).kill()
    assert pool.ask({"gold": "1", "answer": "1.0"}, 20.0) == Outcome(failed="died")
    assert pool.ask({"gold": "1", "answer": "1.0"}, 20.0) == RIGHT


def test_a_judge_that_cannot_start_says_so():
    with pytest.raises(sandbox.KeeperDied, match="KeyError: 'no such kind'"):
        Pool(("no such kind",), memory_mb=256, workers=1).ask({}, 1.0)


def test_nothing_is_left_when_a_run_is_killed(tmp_path: Path):
    program = """
import os, sys, threading
from verl_trb.rewards.sandbox import Limits, ask, _pool
limits = Limits(seconds=3.0)
assert ask("math", {"gold": "1", "answer": "1.0"}, limits).verdict is True
print(_pool(("math",), limits.memory_mb, limits.workers, os.getpid()).free.queue[-1].process.pid, flush=True)
ask("math", {"gold": "1", "answer": "9^{9^{9^9}}"}, limits)
"""
    run = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ}
    )
    assert run.stdout is not None
    keeper = psutil.Process(int(run.stdout.readline()))
    processes = [keeper, *keeper.children()]
    assert len(processes) == 2
    run.send_signal(signal.SIGKILL)
    run.wait()
    gone, alive = psutil.wait_procs(processes, timeout=3.0 + GRACE)
    assert not alive


# ------------------------------------------------------------------------------------------ as verl calls it


def test_many_threads_at_a_time():
    before = threading.active_count()
    with ThreadPoolExecutor(8) as threads:
        scores = list(threads.map(lambda n: compute_score("math", f"\\boxed{{{n}.0}}", str(n // 2 * 2)), range(60)))
    assert scores == [1.0, 0.0] * 30
    assert threading.active_count() == before


def test_a_hostile_answer_does_not_hold_the_others_up():
    limits = Limits(seconds=6.0, memory_mb=700)  # a pool of its own, of two workers
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda n: judge("math", r"\boxed{1.0}", "1", limits=limits), range(8)))  # both have started
        slow = threads.submit(judge, "math", HOSTILE["tower"], "1", None, limits)
        time.sleep(0.2)
        quick = [threads.submit(judge, "math", f"\\boxed{{{n}.0}}", f"{n}", None, limits) for n in range(20)]
        assert all(future.result().score == 1.0 for future in quick)
        assert not slow.done()
        assert slow.result().why == "time limit"


class Characters:
    """A tokenizer whose ids are code points."""

    def decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> str:
        return "".join(map(chr, ids.tolist()))


def test_the_papers_recipes_use_it_through_verls_reward_manager():
    from verl import DataProto
    from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager
    from verl.trainer.ppo.reward import get_custom_reward_fn

    recipe = OmegaConf.load(ROOT / "recipes" / "_paper.yaml")
    recipe.reward.custom_reward_function.reward_kwargs = {"time_limit": 10.0}

    def rollout(response: str) -> DataProto:
        ids = torch.tensor([[ord(character) for character in response]])
        facts = {"data_source": "math500", "reward_model": {"ground_truth": "34"}, "extra_info": {"index": 0}}
        return DataProto.from_dict(
            {"responses": ids, "attention_mask": torch.ones_like(ids)},
            {key: np.array([value], dtype=object) for key, value in facts.items()},
        )

    async def score(*responses: str) -> list[float]:
        manager = NaiveRewardManager(recipe, Characters(), get_custom_reward_fn(recipe))
        results = await asyncio.gather(*(manager.run_single(rollout(response)) for response in responses))
        return [result["reward_score"] for result in results]

    assert asyncio.run(score(r"so \boxed{34.0}", r"so \boxed{35}", "Answer: 68/2")) == [1.0, 0.0, 1.0]


# ------------------------------------------------------------------------------------------ reasoning-gym


def test_reasoning_gym_rows_go_to_their_own_verifier():
    gym = pytest.importorskip("reasoning_gym")
    entry = gym.create_dataset("chain_sum", seed=0, size=1)[0]
    source, extra = "reasoning_gym/chain_sum", {"entry": json.dumps(entry, default=str)}
    limits = Limits(seconds=20.0)
    right, wrong = entry["answer"], str(int(entry["answer"]) + 1)
    assert judge(source, f"\\boxed{{{right}}}", right, extra, limits).score == 1.0
    assert judge(source, f"It is\n{right}", right, extra, limits).score == 1.0
    assert judge(source, f"\\boxed{{{wrong}}}", right, extra, limits).score == 0.0
    assert judge(source, f"\\boxed{{{wrong} or {right}}}", right, extra, limits).score == 0.0
    assert judge(source, "", right, extra, limits) == (0.0, "no answer")
    with pytest.raises(ValueError, match="extra_info.entry"):
        judge(source, "1", right, {}, limits)


def test_last_boxed_of_a_solution():
    assert last_boxed(r"We get $x=\boxed{5}$ because $2+3=5$.") == "5"
    assert last_boxed("no box") is None
