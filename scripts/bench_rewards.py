"""Answers judged per second: the sandboxed reward against math-verify called directly, on one process.

python scripts/bench_rewards.py            # 1,000 responses of about 5,000 characters each, a few seconds
python scripts/bench_rewards.py --file ~/data/verl_trb/dapo_math_17k.parquet    # its gold answers
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from verl_trb.data_files import read_rows
from verl_trb.rewards.math import compute_score

REASONING = "Let us think about it step by step. " * 140


def measure(name: str, score: Callable[[str, str], float], golds: list[str], kind: Callable[[str], str]) -> None:
    """Prints how many of the golds' responses are judged in a second, and how many are right."""
    score(golds[0], wrong(golds[0]))  # the keeper starts
    start = time.perf_counter()
    right = sum(score(gold, kind(gold)) for gold in golds)
    print(f"{name:32} {kind.__name__:16} {len(golds) / (time.perf_counter() - start):8.0f} /s   right {right:.0f}")


def sandboxed(gold: str, response: str) -> float:
    return compute_score("math", response, gold)


def direct(gold: str, response: str) -> float:
    from math_verify import parse, verify

    return float(verify(parse(rf"$\boxed{{{gold}}}$"), parse(response)))


def same_text(gold: str) -> str:
    return rf"{REASONING}\boxed{{{gold}}}"


def another_form(gold: str) -> str:
    return rf"{REASONING}\boxed{{{gold}+0}}"


def wrong(gold: str) -> str:
    return rf"{REASONING}\boxed{{{gold}+1}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--file", type=Path, help="a prepared file, for its gold answers (integers by default)")
    file = parser.parse_args().file
    golds = [str(number) for number in range(1, 1001)]
    if file:
        golds = [row["reward_model"]["ground_truth"] for row in read_rows(file.expanduser())][:1000]

    for kind in (same_text, another_form, wrong):
        measure("sandboxed reward", sandboxed, golds, kind)
        measure("math-verify on the whole text", direct, golds, kind)


if __name__ == "__main__":
    main()
