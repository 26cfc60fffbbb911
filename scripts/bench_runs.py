"""What the benchmarks of whole steps share: pairs of models, prompts, and runs of ours, each in a process of its own.

Imported by bench_trl.py and bench_verl_opd.py; leaves out what only one of them needs.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd


class Case(NamedTuple):
    """A pair of models and how it is trained: `rollouts` of exactly or at most `tokens` tokens a step."""

    name: str
    student: Path
    teacher: Path
    rollouts: int
    tokens: int
    dtype: str
    prompts: list[str]


def toy(cache: str = "~/.cache/verl_trb") -> Case:
    """0.1M <- 0.8M, the quickstart's pair, float32: 32 rollouts of at most 32 tokens."""
    from verl_trb.tasks.prepare import prepare

    made = prepare("table_walk", cache, lambda text: None)
    rows = pd.read_parquet(made.train_file)
    prompts = [messages[0]["content"] for messages in rows["prompt"]][:2048]
    return Case("0.1M <- 0.8M", Path(made.student), Path(made.teacher), 32, 32, "float32", prompts)


def random_pair(folder: Path) -> Case:
    """42M <- 335M of bench_models.py, bfloat16: 16 rollouts of 64 tokens, prompts of 16 random words."""
    from bench_models import VOCABULARY, make_models

    made = make_models(folder)
    rng = random.Random(0)
    prompts = [" ".join(f"w{rng.randrange(4, VOCABULARY)}" for _ in range(16)) for _ in range(1024)]
    return Case("42M <- 335M", made.student, made.teacher, 16, 64, "bfloat16", prompts)


def write_prompts(case: Case, file: Path) -> Path:
    """The case's prompts as verl's parquet."""
    rows = [
        {
            "data_source": "table_walk",
            "prompt": [{"role": "user", "content": prompt}],
            "ability": "bench",
            "reward_model": {"style": "rule", "ground_truth": "no answer"},
            "extra_info": {"index": index, "split": "train"},
        }
        for index, prompt in enumerate(case.prompts)
    ]
    pd.DataFrame(rows).to_parquet(file)
    return file


def settings(case: Case, prompts: Path, run_dir: Path, steps: int, threads: int) -> list[str]:
    """Overrides of recipe=quickstart that make it this case. The learning rate is 0: every step sees one student."""
    bfloat16 = case.dtype == "bfloat16"
    kind = "bf16" if bfloat16 else "fp32"
    engine = {"kv_cache_memory_bytes": 2**30 if bfloat16 else 2**28}
    values: dict[str, Any] = {
        "trb.prepare": "null",
        "trb.teacher.path": case.teacher,
        "actor_rollout_ref.model.path": case.student,
        "trb.run_dir": run_dir,
        "data.train_files": prompts,
        "data.val_files": prompts,
        "data.train_batch_size": case.rollouts,
        "data.max_prompt_length": 16,
        "data.max_response_length": case.tokens,
        "actor_rollout_ref.actor.ppo_mini_batch_size": case.rollouts,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": case.rollouts,
        "actor_rollout_ref.actor.optim.lr": 0,
        "actor_rollout_ref.actor.fsdp_config.model_dtype": kind,
        "actor_rollout_ref.actor.fsdp_config.dtype": case.dtype,
        "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype": kind,
        "actor_rollout_ref.rollout.dtype": case.dtype,
        "actor_rollout_ref.rollout.max_num_seqs": case.rollouts,
        "actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_memory_bytes": engine["kv_cache_memory_bytes"],
        "ray_kwargs.ray_init.runtime_env.env_vars.OMP_NUM_THREADS": f"'{threads}'",
        "trainer.total_training_steps": steps,
        "trainer.total_epochs": 100,
        "trainer.test_freq": -1,
        "trainer.save_freq": -1,
        "trainer.val_before_train": "false",
        "trainer.resume_mode": "disable",
    }
    return ["recipe=quickstart", *(f"{key}={value}" for key, value in values.items())]


def ours(overrides: Sequence[str], run_dir: Path) -> list[dict[str, Any]]:
    """Run ours to its end and return its metrics, a dictionary a step. SystemExit if it fails."""
    command = [sys.executable, "-m", "verl_trb.main", *overrides]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"{' '.join(command)}\nfailed:\n{finished.stdout[-3000:]}{finished.stderr[-3000:]}")
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def median(steps: Sequence[dict[str, Any]], name: str) -> float:
    """The median of a metric over steps that have it; NaN if none has."""
    values = [step[name] for step in steps if name in step]
    return statistics.median(values) if values else float("nan")
