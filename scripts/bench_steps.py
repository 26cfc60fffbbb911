"""A training step: ours against verl's own on-policy distillation and TRL's GKDTrainer, on the same models and prompts.

    python scripts/bench_steps.py FOLDER                  # 42M <- 335M, 16 rollouts of 64 tokens; about 15 minutes
    python scripts/bench_steps.py FOLDER --size toy       # 0.1M <- 0.8M, 32 rollouts of 32 tokens
    python scripts/bench_steps.py FOLDER --sides trl trb  # some of it

Sides, each a whole training of its own, one after the other, `--rounds` times in turn:

    vanilla    ours, rollouts of the student alone, exact reverse KL
    trb        ours, every rollout guided with epsilon = 0.02 (as in the warm-up)
    topk       the same with the top-k form of the loss
    reuse      that with trb.reuse_verification: the engine's reading of the teacher serves the loss
    trb_reuse  trb with it: the exact loss from the teacher's hidden states, which the engine kept
    verl       verl's own: student rollouts, a vLLM of its own for the teacher, k3 on the sampled tokens
    verl_fast  the same without its pause: verl looks for finished rollouts every 2 s, here every 0.05 s
    trl        TRL's GKDTrainer with lmbda = 1 and beta = 1: student rollouts, exact reverse KL, one process

The models are random, as in bench_models.py, so that a rollout hardly ever ends early: every side does the same work.
The dtype is bfloat16 where the CPU multiplies it, else and for the toy float32, in models, optimizer and rollouts of
every side.
Prints the median seconds of a step, without the first two, and the ratios. TRL is not one of our requirements: it is
installed into FOLDER (`pip install --target`), without its dependencies, which are ours too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench_models import VOCABULARY, make_models, native_dtype, shape, write_prompts

SCRIPTS = Path(__file__).parent
TRL = "trl==1.16.0"
PROMPT, EPSILON, SKIPPED, LR = 32, 0.02, 2, 1e-5
GUIDED: dict[str, Any] = {"method": "fixed_epsilon", "trb.epsilon": EPSILON}
OURS: dict[str, dict[str, Any]] = {
    "vanilla": {"method": "vanilla", "trb.loss": "full"},
    "trb": {**GUIDED, "trb.loss": "full"},
    "topk": {**GUIDED, "trb.loss": "topk"},
    "reuse": {**GUIDED, "trb.loss": "topk", "trb.reuse_verification": "true"},
    "trb_reuse": {**GUIDED, "trb.loss": "full", "trb.reuse_verification": "true"},
}
SIDES = (*OURS, "verl", "verl_fast", "trl")
SIZES = {"bench": (16, 64), "toy": (32, 32)}  # rollouts, their tokens
TOY_VOCABULARY = 64
TOY = {"student": shape(64, 176, 2, 2, 1), "teacher": shape(128, 352, 4, 4, 1)}
TARGETS = [
    ("vanilla", "verl", 0.8),
    ("trb", "verl", 1.0),
    ("vanilla", "trl", 0.7),
    ("trb", "trl", 1.2),
    ("trb_reuse", "trl", 1.2),
]
TOY_TARGET = 0.4
BESIDE = [("vanilla", "verl_fast"), ("trb", "verl_fast"), ("reuse", "topk"), ("trb_reuse", "trb")]


class Bench:
    """The models, prompts and settings that all sides share."""

    def __init__(self, folder: Path, size: str, steps: int) -> None:
        self.folder, self.size, self.steps = folder, size, steps
        self.dtype = native_dtype() if size == "bench" else "float32"
        self.batch, self.response = SIZES[size]
        if size == "bench":
            self.models, vocabulary = make_models(folder / "models"), VOCABULARY
        else:
            self.models, vocabulary = make_models(folder / "toy", TOY, TOY_VOCABULARY), TOY_VOCABULARY
        self.data = folder / f"{size}.parquet"
        self.prompts = write_prompts(self.data, self.batch * steps, PROMPT - 1, vocabulary)

    def common(self) -> dict[str, Any]:
        """Settings of verl that both its own run and ours have."""
        actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
        short = {"bfloat16": "bf16", "float32": "fp32"}[self.dtype]
        return {
            "data.train_files": self.data,
            "data.val_files": self.data,
            "data.train_batch_size": self.batch,
            "data.max_prompt_length": PROMPT,
            "data.max_response_length": self.response,
            "data.shuffle": "false",
            "actor_rollout_ref.model.path": self.models.student,
            f"{actor}.ppo_mini_batch_size": self.batch,
            f"{actor}.ppo_micro_batch_size_per_gpu": self.batch,
            f"{actor}.optim.lr": LR,
            f"{actor}.fsdp_config.model_dtype": short,
            f"{actor}.fsdp_config.dtype": self.dtype,
            f"{actor}.fsdp_config.mixed_precision.param_dtype": short,
            f"{rollout}.dtype": self.dtype,
            f"{rollout}.max_num_seqs": self.batch,
            f"{rollout}.max_num_batched_tokens": 2048,
            f"{rollout}.log_prob_micro_batch_size_per_gpu": self.batch,
            "reward.custom_reward_function.path": SCRIPTS / "verl_opd.py",
            "reward.custom_reward_function.name": "compute_score",
            # Of each process: they take turns. The toy's are too short for two.
            "ray_kwargs.ray_init.runtime_env.env_vars.OMP_NUM_THREADS": "'2'" if self.size == "bench" else "'1'",
            "trainer.total_training_steps": self.steps,
            "trainer.total_epochs": 1,
            "trainer.test_freq": -1,
            "trainer.save_freq": -1,
            "trainer.val_before_train": "false",
        }

    def ours(self, side: str, folder: Path) -> list[dict[str, Any]]:
        own = {
            "recipe": "quickstart",
            **self.common(),
            "trb.prepare": "null",
            "trb.teacher.path": self.models.teacher,
            "trb.sample_prompts": 0,
            "trb.run_dir": folder / "run",
            **OURS[side],
        }
        self._run([sys.executable, "-m", "verl_trb.main", *_overrides(own)], folder)
        return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]

    def verl(self, folder: Path, poll: float | None) -> list[dict[str, Any]]:
        teacher = "distillation.teacher_models.teacher_model"
        extension = "verl_opd.WorkerExtension"
        own = {
            **self.common(),
            "actor_rollout_ref.rollout.name": "vllm",
            "actor_rollout_ref.rollout.mode": "async",
            "actor_rollout_ref.rollout.calculate_log_probs": "true",
            "actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls": extension,
            "algorithm.adv_estimator": "grpo",
            "critic.enable": "false",
            "trainer.use_v1": "true",
            "trainer.logger": "[file]",
            "trainer.n_gpus_per_node": 1,
            "trainer.default_local_dir": folder / "checkpoints",
            "ray_kwargs.ray_init.num_gpus": 2,
            "distillation.enabled": "true",
            "distillation.n_gpus_per_node": 1,
            "distillation.nnodes": 1,
            "distillation.distillation_loss.use_task_rewards": "false",
            f"{teacher}.key": "random",
            f"{teacher}.model_path": self.models.teacher,
            f"{teacher}.num_replicas": 1,
            f"{teacher}.inference.tensor_model_parallel_size": 1,
            f"{teacher}.inference.free_cache_engine": "false",
            f"{teacher}.inference.enable_sleep_mode": "false",
            f"{teacher}.inference.max_model_len": PROMPT + self.response + 2,
            f"{teacher}.inference.max_num_seqs": self.batch,
            f"{teacher}.inference.max_num_batched_tokens": 2048,
            f"{teacher}.inference.engine_kwargs.vllm.kv_cache_memory_bytes": 1 << 28,
        }
        log = folder / "metrics.jsonl"
        environment = {
            "PYTHONPATH": str(SCRIPTS),
            "VERL_FILE_LOGGER_PATH": str(log),
            **({} if poll is None else {"BENCH_POLL": str(poll)}),
        }
        self._run([sys.executable, str(SCRIPTS / "verl_opd.py"), *_overrides(own, "++")], folder, environment)
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        return [{"step": row["step"], **row["data"]} for row in rows]

    def trl(self, folder: Path) -> list[dict[str, Any]]:
        packages = self.folder / "packages"
        if not (packages / "trl").exists():
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), TRL]
            subprocess.run(command, check=True)
        settings = {
            "student": str(self.models.student),
            "teacher": str(self.models.teacher),
            "dtype": self.dtype,
            "prompts": self.prompts,
            "prompt": PROMPT,
            "response": self.response,
            "batch": self.batch,
            "steps": self.steps,
            "lr": LR,
            "folder": str(folder / "trl"),
        }
        file = folder / "settings.json"
        file.write_text(json.dumps(settings))
        output = self._run(
            [sys.executable, str(SCRIPTS / "trl_gkd.py"), str(file)], folder, {"PYTHONPATH": str(packages)}
        )
        seconds = json.loads(output.splitlines()[-1])["seconds"]
        return [{"step": step, "timing_s/step": value} for step, value in enumerate(seconds, start=1)]

    def run(self, side: str, folder: Path) -> list[dict[str, Any]]:
        """Metrics of the side's steps; all have `timing_s/step`."""
        folder.mkdir(parents=True, exist_ok=True)
        if side == "trl":
            return self.trl(folder)
        if side.startswith("verl"):
            return self.verl(folder, 0.05 if side == "verl_fast" else None)
        return self.ours(side, folder)

    def _run(self, command: list[str], folder: Path, extra: dict[str, str] | None = None) -> str:
        """Its standard output."""
        environment = {**os.environ, **(extra or {})}
        log = (folder / "screen.txt").open("w")
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, env=environment, text=True, cwd=folder)
        (folder / "output.txt").write_text(done.stdout)
        if done.returncode:
            sys.exit(f"a side failed: see output.txt and screen.txt in {folder}")
        return done.stdout


def _overrides(settings: dict[str, Any], prefix: str = "") -> list[str]:
    return [f"{prefix}{key}={value}" for key, value in settings.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=tuple(SIZES), default="bench")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(folder, arguments.size, arguments.steps)
    print(f"{bench.size}: {bench.batch} rollouts of {bench.response} tokens, {bench.dtype}", flush=True)
    taken: dict[str, list[dict[str, Any]]] = {side: [] for side in arguments.sides}
    for number in range(arguments.rounds):
        for side in arguments.sides:
            place = folder / f"{bench.size}-{side}-{os.getpid()}-{number}"
            rows = [row for row in bench.run(side, place) if "timing_s/step" in row and row["step"] > SKIPPED]
            taken[side] += rows
            middle = statistics.median(row["timing_s/step"] for row in rows)
            print(f"  round {number + 1}, {side}: {middle:.3f} s a step", flush=True)
    medians = {side: statistics.median(row["timing_s/step"] for row in rows) for side, rows in taken.items()}
    print()
    for side, rows in taken.items():
        parts = sorted({key for row in rows for key in row if key.startswith("timing_s/") and key != "timing_s/step"})
        middles = [(statistics.median(row.get(key, 0.0) for row in rows), key.partition("/")[2]) for key in parts]
        shown = ", ".join(f"{name} {value:.2f}" for value, name in sorted(middles, reverse=True)[:6] if value > 0.005)
        print(f"{side:10} {medians[side]:7.3f} s   {shown}")
    print()
    if bench.size == "toy" and "vanilla" in medians:  # its target is the fixed cost
        seconds = medians["vanilla"]
        print(f"{'ok    ' if seconds <= TOY_TARGET else 'MISSED'}  vanilla: {seconds:.2f} s, target {TOY_TARGET} s")
    for ours, theirs, target in TARGETS:
        if bench.size == "bench" and ours in medians and theirs in medians:
            ratio = medians[ours] / medians[theirs]
            print(f"{'ok    ' if ratio <= target else 'MISSED'}  {ours} / {theirs}: {ratio:.2f}, target {target}")
    for ours, theirs in BESIDE:
        if ours in medians and theirs in medians:
            print(f"        {ours} / {theirs}: {medians[ours] / medians[theirs]:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
