"""A step of ours against a step of verl's own on-policy distillation: `distillation.enabled`, loss k3.

    .venv/bin/python scripts/bench_verl_opd.py                    # about 4 minutes on 2 cores

verl's draws rollouts from the student, asks a dedicated vLLM server of the teacher for the log-probability of every
token, and estimates the reverse KL from those (k3, one sample a token). The quickstart's pair, data and settings,
32 rollouts of at most 32 tokens, learning rate 0, the same number of threads a process. Two runs: one of verl's, whose
first half polls its replay buffer every 2 s, its default, and whose second half every 0.05 s; and one of ours, whose
first half is guided (epsilon = 0.02) and whose second half is not. A step is everything between two steps. Prints
medians and ratios to verl's with the fast poll; exits with 1 where a target is missed.

What verl needs on a CPU beside the platform of verl_trb: a process group over gloo (`Worker`), and weight syncs that
leave vLLM's packed weights intact (`Weights`); both are what our own worker and engine do.
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

from bench_runs import Case, median, ours, settings, toy, write_prompts

WARM = 3  # steps that are not counted, of each half
SLOW, FAST = 2.0, 0.05  # seconds between two looks into the replay buffer: verl's default, and ours
TARGETS = {"guided": 1.0, "vanilla": 0.8}  # of verl's step with the fast poll
SHARES = ("gen", "update_actor", "update_weights", "other", "between")


def verl_side(overrides: list[str], steps: int, out: Path) -> None:
    """In a process of its own: verl's trainer, `steps` steps with the slow poll and as many with the fast."""
    from omegaconf import DictConfig, OmegaConf

    from verl_trb import composition

    def task(config: DictConfig) -> int:
        import ray
        from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

        config = verl_config(config)
        runtime = OmegaConf.to_container(get_ppo_ray_runtime_env(config), resolve=True)
        given = OmegaConf.to_container(config.ray_kwargs.ray_init, resolve=True)
        variables = given.pop("runtime_env")["env_vars"]
        here = str(Path(__file__).parent)
        runtime["env_vars"].update(variables, TRANSFER_QUEUE_ENABLE="1", PYTHONPATH=here)
        ray.init(log_to_driver=False, runtime_env=runtime, **given)
        runner = ray.remote(Runner).remote()
        ray.get(runner.run.remote(config, steps, out))
        ray.shutdown()
        return 0

    composition.run(task, overrides)


def verl_config(config: Any) -> Any:
    """Our configuration as one of verl's own on-policy distillation."""
    from omegaconf import OmegaConf, open_dict

    config = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    student, teacher = config.actor_rollout_ref, config.distillation.teacher_models.teacher_model
    with open_dict(config):
        student.rollout.name = "vllm"
        student.rollout.load_format = "auto"
        student.rollout.engine_kwargs.vllm.worker_extension_cls = "bench_verl_opd.Weights"
        config.distillation.update(enabled=True, nnodes=1, n_gpus_per_node=1)
        config.distillation.distillation_loss.update(loss_mode="k3", use_task_rewards=False)
        teacher.model_path = config.trb.teacher.path
        shared = ("dtype", "engine_kwargs", "max_num_seqs", "enforce_eager", "free_cache_engine")
        teacher.inference.update(
            name="vllm",
            tensor_model_parallel_size=1,
            max_model_len=128,
            max_num_batched_tokens=student.rollout.max_num_batched_tokens,
            **{key: student.rollout[key] for key in shared},
        )
        config.ray_kwargs.ray_init.num_gpus = 2
        config.transfer_queue.enable = True
    return config


class Runner:
    """verl's task runner, with the trainer below."""

    def run(self, config: Any, steps: int, out: Path) -> None:
        import transfer_queue as tq
        from verl.trainer.ppo.v1 import AgentLoopManagerTQ

        tq.init(config.transfer_queue)
        trainer = timed_trainer(config, steps, out)
        trainer.init()
        agent_loops = AgentLoopManagerTQ.create(
            config=config,
            llm_client=trainer.get_llm_client(),
            teacher_client=trainer.get_teacher_client(),
            reward_loop_worker_handles=trainer.get_reward_handles(),
        )
        trainer.fit(agent_loops)
        tq.close()


def timed_trainer(config: Any, steps: int, out: Path) -> Any:
    """verl's synchronous trainer: the poll as asked, and each step's times in `out`, a line a step."""
    import ray
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    class TimedTrainer(PPOTrainerSync):
        def _init_resource_pool_mgr(self) -> None:
            self.role_worker_mapping: dict[Any, Any] = {}
            super()._init_resource_pool_mgr()
            self.role_worker_mapping = {role: ray.remote(worker_class()) for role in self.role_worker_mapping}

        def on_step_begin(self) -> None:
            super().on_step_begin()
            self.replay_buffer.poll_interval = SLOW if self.global_steps <= steps else FAST
            if self.global_steps > 1:
                self.timing_raw["between"] = time.time() - self.recorded_from

        def _compute_metrics(self, batch: Any, metrics: dict, timing_raw: dict, *args: Any, **kwargs: Any) -> None:
            self.recorded_from = time.time()
            parts = sum(value for name, value in timing_raw.items() if name not in ("step", "between"))
            timing_raw["other"] = timing_raw["step"] - parts
            super()._compute_metrics(batch, metrics, timing_raw, *args, **kwargs)
            wanted = ("timing_s/", "response_length/mean", "actor/")
            line = {name: float(value) for name, value in metrics.items() if name.startswith(wanted)}
            with open(out, "a") as file:
                file.write(json.dumps(line) + "\n")

    return TimedTrainer(config)


def worker_class() -> type:
    from verl.utils.distributed import initialize_global_process_group_ray
    from verl.workers.engine_workers import ActorRolloutRefWorker

    class Worker(ActorRolloutRefWorker):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            initialize_global_process_group_ray(backend="gloo")
            super().__init__(*args, **kwargs)

    return Worker


def __getattr__(name: str) -> Any:
    """`Weights`, made when vLLM asks for it: importing it needs vLLM."""
    if name != "Weights":
        raise AttributeError(name)
    import torch
    from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    from verl_trb.rollout.worker_extension import repack_tied_head

    class Weights(vLLMColocateWorkerExtension):
        """verl's worker extension, with weight syncs through vLLM's layerwise reload."""

        def _iter_all_models_with_config(self) -> Any:
            return iter(())  # repacked here

        def update_weights_from_ipc(self, *args: Any, **kwargs: Any) -> None:
            model = self.model_runner.model
            with torch.device(self.device):
                initialize_layerwise_reload(model)
                super().update_weights_from_ipc(*args, **kwargs)
                finalize_layerwise_reload(model, self.model_runner.model_config)
                repack_tied_head(model)

        def _update_weights(self, weights: list[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> None:
            # The reload keeps tensors until a layer is complete; the transfer buffer is reused before.
            copies = [(name, tensor.clone()) for name, tensor in weights]
            super()._update_weights(copies, *args, **kwargs)

    return Weights


def run_verl(case: Case, folder: Path, steps: int, threads: int) -> dict[str, list[dict[str, Any]]]:
    overrides = settings(case, write_prompts(case, folder / "verl.parquet"), folder / "verl", 2 * steps, threads)
    out = folder / "verl.jsonl"
    command = [sys.executable, __file__, "--side", json.dumps(overrides), "--steps", str(steps), "--out", str(out)]
    with open(folder / "verl.log", "w") as log:
        finished = subprocess.run(command, stdout=log, stderr=log, env={**os.environ, "VERL_PLATFORM": "cpu"})
    if finished.returncode:
        raise SystemExit(f"verl failed:\n{(folder / 'verl.log').read_text()[-4000:]}")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    return {"poll 2 s": lines[WARM:steps], "poll 0.05 s": lines[steps + WARM :]}


def run_ours(case: Case, folder: Path, steps: int, threads: int) -> dict[str, list[dict[str, Any]]]:
    overrides = settings(case, write_prompts(case, folder / "ours.parquet"), folder / "ours", 2 * steps, threads)
    overrides += ["method=fixed_epsilon", "trb.epsilon=0.02", f"trb.guided_steps={steps}"]
    lines = ours(overrides, folder / "ours")
    return {"guided": lines[WARM:steps], "vanilla": lines[steps + WARM :]}


def step_seconds(lines: list[dict[str, Any]]) -> float:
    return statistics.median(line["timing_s/step"] + line["timing_s/between"] for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cache", default="~/.cache/verl_trb", help="where the quickstart's pair is, or goes: trb.cache_dir"
    )
    parser.add_argument("--steps", type=int, default=15, help="of each half; the first 3 are not counted")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        verl_side(json.loads(given.side), given.steps, given.out)
        return 0
    case = toy(given.cache)
    print(f"{case.name}, {case.dtype}: {case.rollouts} rollouts of at most {case.tokens} tokens")
    baseline, missed = 0.0, False
    with tempfile.TemporaryDirectory() as folder:
        for who, run in (("verl", run_verl), ("ours", run_ours)):
            for name, lines in run(case, Path(folder), given.steps, given.threads).items():
                seconds = step_seconds(lines)
                shares = ", ".join(f"{key} {median(lines, f'timing_s/{key}'):.3f}" for key in SHARES)
                ratio = ""
                if who == "verl":
                    baseline = seconds
                else:
                    ratio = f", {seconds / baseline:.2f} x verl"
                    missed |= seconds > TARGETS[name] * baseline
                tokens = median(lines, "response_length/mean")
                print(f"  {who}, {name:<12} {seconds:.3f} s a step{ratio} ({tokens:.1f} tokens a rollout; {shares})")
    print(f"targets, of verl with the fast poll: {TARGETS}; {'missed' if missed else 'met'}")
    return int(missed)


if __name__ == "__main__":
    import bench_verl_opd  # vLLM's and Ray's processes find the classes above by this name

    sys.exit(bench_verl_opd.main())
