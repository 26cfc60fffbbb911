"""A step of ours against a step of TRL's GKDTrainer with lmbda=1, beta=1: vanilla OPD with the exact reverse KL.

    .venv/bin/python -m pip install --no-deps --target build/trl trl==1.16.0      # what TRL needs else is there already
    .venv/bin/python scripts/bench_trl.py --trl build/trl                         # about 5 minutes on 2 cores

Two cases (bench_runs.py): 42M <- 335M in bfloat16, 16 rollouts of 64 tokens; and the quickstart's 0.1M <- 0.8M in
float32, 32 rollouts of at most 32 tokens. Per case one process of TRL and one run of ours, whose first half is guided
(epsilon = 0.02) and whose second half is vanilla. The learning rate is 0 on both sides. A step of ours is everything
between two steps, `timing_s/step` + `timing_s/between`; TRL's is the time between the ends of two steps. Prints
medians and ratios; exits with 1 where a target is missed. Leaves out quality: both minimize the same loss.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_runs import Case, median, ours, random_pair, settings, toy, write_prompts

WARM = 3  # steps that are not counted, of each part
TARGETS = {"vanilla": 0.7, "guided": 1.2}  # of TRL's step, 42M <- 335M
SHARES = ("gen", "update_actor", "teacher", "update_weights", "other", "between")
FIXED_SECONDS = 0.4  # of ours at toy size


def trl_side(case: dict[str, Any], steps: int) -> None:
    """In a process of its own: train with TRL, print the seconds of each step and the tokens of a rollout as JSON."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    torch.set_num_threads(case["threads"])
    tokenizer = AutoTokenizer.from_pretrained(case["student"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    dtype = getattr(torch, case["dtype"])
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(case[name], dtype=dtype) for name in ("student", "teacher")
    )
    ends: list[float] = []
    lengths: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    class Counted(GKDTrainer):
        @staticmethod
        def generate_on_policy_outputs(*args: Any, **kwargs: Any) -> Any:
            outputs = GKDTrainer.generate_on_policy_outputs(*args, **kwargs)
            lengths.append(float((outputs[2] != -100).sum() / outputs[2].shape[0]))
            return outputs

    rows = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": prompt[:1] or "w5"}]}
        for prompt in case["prompts"]
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = GKDConfig(
            output_dir=folder,
            per_device_train_batch_size=case["rollouts"],
            max_steps=steps,
            learning_rate=0.0,
            lmbda=1.0,
            beta=1.0,
            temperature=1.0,
            max_new_tokens=case["tokens"],
            max_length=16 + case["tokens"],
            bf16=False,  # the models are in their dtype already
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Counted(
            model=student,
            teacher_model=teacher,
            args=config,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows),
            callbacks=[Clock()],
        )
        trainer.train()
    seconds = [after - before for before, after in zip(ends, ends[1:], strict=False)]
    print(json.dumps({"seconds": seconds, "tokens": statistics.mean(lengths)}))


def run_trl(case: Case, trl: Path, steps: int, threads: int) -> dict[str, Any]:
    given = json.dumps({**case._asdict(), "threads": threads}, default=str)
    environment = {**os.environ, "PYTHONPATH": str(trl.absolute()), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--side", given, "--steps", str(steps)]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    if finished.returncode:
        raise SystemExit(f"TRL failed:\n{finished.stdout[-2000:]}{finished.stderr[-4000:]}")
    return json.loads(finished.stdout.splitlines()[-1])


def run_ours(case: Case, folder: Path, steps: int, threads: int) -> dict[str, list[dict[str, Any]]]:
    """The counted steps of both halves of a run."""
    overrides = settings(case, write_prompts(case, folder / "prompts.parquet"), folder / "run", 2 * steps, threads)
    overrides += ["method=fixed_epsilon", "trb.epsilon=0.02", f"trb.guided_steps={steps}"]
    lines = ours(overrides, folder / "run")
    return {"guided": lines[WARM:steps], "vanilla": lines[steps + WARM :]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, help="the folder TRL was installed into")
    parser.add_argument("--models", type=Path, default=Path("build/bench_models"), help="where 42M <- 335M is, or goes")
    parser.add_argument(
        "--cache", default="~/.cache/verl_trb", help="where the quickstart's pair is, or goes: trb.cache_dir"
    )
    parser.add_argument("--only", choices=("42M", "0.1M"), help="one of the two cases")
    parser.add_argument("--steps", type=int, default=10, help="of each side and part; the first 3 are not counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        trl_side(json.loads(given.side), given.steps)
        return 0
    if given.trl is None or not (given.trl / "trl").is_dir():
        target = given.trl or "build/trl"
        print(f"error: install TRL first: {sys.executable} -m pip install --no-deps --target {target} trl==1.16.0, "
              f"then give --trl {target}", file=sys.stderr)  # fmt: skip
        return 2
    missed = False
    for case in [toy(given.cache), random_pair(given.models)]:
        if given.only and not case.name.startswith(given.only):
            continue
        theirs = run_trl(case, given.trl, given.steps, given.threads)
        baseline = statistics.median(theirs["seconds"][WARM - 1 :])
        print(f"{case.name}, {case.dtype}: {case.rollouts} rollouts of at most {case.tokens} tokens")
        print(f"  TRL       {baseline:.3f} s a step ({theirs['tokens']:.1f} tokens a rollout)")
        with tempfile.TemporaryDirectory() as folder:
            parts = run_ours(case, Path(folder), given.steps, given.threads)
        for name, lines in parts.items():
            seconds = statistics.median(line["timing_s/step"] + line["timing_s/between"] for line in lines)
            tokens = median(lines, "response_length/mean")
            shares = ", ".join(f"{key} {median(lines, f'timing_s/{key}'):.3f}" for key in SHARES)
            ratio = seconds / baseline
            print(f"  {name:<9} {seconds:.3f} s a step, {ratio:.2f} x TRL ({tokens:.1f} tokens a rollout; {shares})")
            missed |= ratio > TARGETS[name] if case.name.startswith("42M") else seconds > FIXED_SECONDS
    print(f"targets, 42M: {TARGETS}; 0.1M: {FIXED_SECONDS} s a step; {'missed' if missed else 'met'}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
