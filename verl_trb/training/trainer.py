"""verl's synchronous trainer with our worker, the ε schedule, and one metrics line a step."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
import transfer_queue as tq
from tensordict import TensorDict
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.workers.utils.padding import response_from_nested, response_to_nested

import verl_trb.rollout.server  # noqa: F401  registers the rollout engine with verl in this process
from verl_trb.guidance import guidance_metrics
from verl_trb.objective import objective_metrics, step_objective
from verl_trb.policies import get_policy
from verl_trb.rollout.statistics import merge, rollout_metrics
from verl_trb.training.advantage import distillation_advantages
from verl_trb.training.agent_loop import CORRECTED
from verl_trb.training.loss import ADVANTAGES, OBJECTIVE
from verl_trb.training.samples import SampleRecorder
from verl_trb.training.worker import DistillationWorker

Event = dict[str, Any]


class DistillationTrainer(PPOTrainerSync):
    """`emit` receives the events the display shows: stages, and every step's metrics."""

    def __init__(self, config: Any, emit: Callable[[Event], None]) -> None:
        super().__init__(config)
        self.emit = emit
        self.run_dir = Path(config.trb.run_dir)
        self.pending: dict[str, float] = {}

    # ------------------------------------------------------------------ set-up

    def _build_replay_buffer(self):
        buffer = super()._build_replay_buffer()
        buffer.poll_interval = 0.05  # seconds; verl's default of 2 is an argument of the class, not of the config
        return buffer

    def _init_resource_pool_mgr(self) -> None:
        self.role_worker_mapping: dict[Any, Any] = {}
        super()._init_resource_pool_mgr()
        self.role_worker_mapping = {role: ray.remote(DistillationWorker) for role in self.role_worker_mapping}

    def _setup(self) -> None:
        self.emit({"kind": "stage", "text": "loading student and teacher, starting the rollout engine"})
        super()._setup()

    def on_init_end(self) -> None:
        super().on_init_end()
        self.samples = SampleRecorder(self.config, self.tokenizer, self.val_dataset, self.total_training_steps)
        self.emit({"kind": "ready", "step": self.global_steps, "total_steps": self.total_training_steps})

    # ------------------------------------------------------------------ one step

    def on_step_begin(self) -> None:
        if self.samples.due(self.global_steps):
            started = time.perf_counter()
            self.samples.record(self.global_steps, self.llm_server_manager.get_replicas()[0].servers[0])
            self.timing_raw["samples"] = time.perf_counter() - started
        self._take_rollout_sums()  # what validation and samples left behind is not this step's
        self.objective = step_objective(self.config.trb, self.global_steps)
        # verl asks at every step: only a policy gradient needs the student's log-probabilities before the update.
        self.config.algorithm.rollout_correction.bypass_mode = not self.objective.policy_gradient

    def on_sample_end(self) -> None:
        failed = self._take_failures(self.config.data.train_batch_size * self.config.actor_rollout_ref.rollout.n)
        self.pending = rollout_metrics(sums := self._take_rollout_sums())
        self.pending["trb/resubmitted"] = sums.get("resubmitted", 0.0)
        self.pending["trb/failed_rollouts"] = failed
        super().on_sample_end()

    def _take_failures(self, rollouts: int) -> float:
        """How many of `rollouts` failed since the last call, with a warning that says why.

        Raises RuntimeError if all did.
        """
        workers = self.agent_loop_manager.agent_loop_workers
        failures = [failure for taken in ray.get([w.take_failures.remote() for w in workers]) for failure in taken]
        if len(failures) >= rollouts:
            raise RuntimeError(f"all {rollouts} rollouts of step {self.global_steps} failed, with {failures[0]}")
        if failures:
            said = f"{len(failures)} of {rollouts} rollouts failed and were left out, the first with {failures[0]}"
            self.emit({"kind": "warning", "text": f"step {self.global_steps}: {said}"})
        return float(len(failures))

    def _take_rollout_sums(self) -> dict[str, float]:
        servers = [server for replica in self.llm_server_manager.get_replicas() for server in replica.servers]
        return merge(ray.get([server.take_rollout_statistics.remote() for server in servers]))

    def _compute_old_log_prob(self, batch: Any, metrics: dict) -> Any:
        if self.objective.samples:  # the teacher's log-probabilities in the same pass
            batch.extra_info[OBJECTIVE] = self.objective.as_dict()
        batch = super()._compute_old_log_prob(batch, metrics)
        batch.extra_info.pop(OBJECTIVE, None)
        return batch

    def _compute_advantage(self, batch: Any, metrics: dict) -> Any:
        """verl's, of the reward, with the weights of its rollout correction; beside them those of a single-sample
        distillation loss.
        """
        batch = super()._compute_advantage(batch, metrics)
        if not self.objective.samples:
            return batch
        fields = ["response_mask", "old_log_probs", "rollout_log_probs", "teacher_log_probs", "ref_log_prob"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        mask = data["response_mask"]
        data["teacher_log_probs"] = response_from_nested(data["teacher_log_probs"], mask)
        padded = data.to_padded_tensor(0)
        advantages = distillation_advantages(
            self.objective,
            padded["response_mask"],
            padded["old_log_probs"],
            padded["teacher_log_probs"],
            padded["rollout_log_probs"],
            padded.get("ref_log_prob", None),
        )
        nested = TensorDict({ADVANTAGES: response_to_nested(advantages, mask)}, batch_size=len(batch))
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=nested)

    def _update_actor(self, batch: Any, metrics: dict) -> Any:
        batch.extra_info[OBJECTIVE] = self.objective.as_dict()
        batch = super()._update_actor(batch, metrics)
        self.timing_raw["teacher"] = max(self.actor_rollout_wg.take_teacher_seconds())
        for name in ("reverse_kl", "teacher_entropy", "student_entropy", "teacher_logprob"):
            if f"actor/{name}" in metrics:  # not without the teacher
                self.pending[f"trb/{name}"] = metrics.pop(f"actor/{name}")
        # log μ − log π_S with π_S from the trainer: what the engine sampled against what is trained.
        self.pending["trb/log_ratio_trainer"] = metrics.pop("actor/log_ratio", math.nan)
        return batch

    # ------------------------------------------------------------------ what is recorded

    def _validate(self) -> dict[str, float]:
        started = time.perf_counter()
        rollouts = len(self.val_dataset) * self.config.actor_rollout_ref.rollout.val_kwargs.n
        try:
            metrics = super()._validate()
        finally:
            self._take_failures(rollouts)  # says why, where verl has no answers to average
        core = {  # by source: val-core/SOURCE/acc/mean@1
            name.removeprefix("val-core/").rsplit("/", 2)[0]: value
            for name, value in metrics.items()
            if name.startswith("val-core/") and "/mean@" in name
        }
        if core:
            metrics["val/accuracy"] = float(np.mean(list(core.values())))
        if len(core) > 1:
            metrics.update({f"val/{source}": float(value) for source, value in core.items()})
        if not hasattr(self, "timing_raw"):  # validation before the first step
            self._record({**metrics, "timing_s/testing": time.perf_counter() - started}, self.global_steps)
        return metrics

    def _compute_metrics(self, batch: Any, metrics: dict, timing_raw: dict, global_steps: int, epoch: int) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, global_steps, epoch)
        metrics.update(self.pending)
        metrics.update(objective_metrics(self.objective))
        metrics.update(guidance_metrics(self.config.trb, global_steps))
        if get_policy(self.config.trb.policy).marks_corrections:
            data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=[CORRECTED])
            metrics["trb/corrected"] = float(data[CORRECTED].values().double().mean())
        metrics["reward/mean"] = metrics["critic/score/mean"]
        self._record(metrics, global_steps)

    def _record(self, metrics: dict[str, Any], step: int) -> None:
        """Append the step to metrics.jsonl, whole or not at all, and show it."""
        line = {"step": step, **{name: _plain(value) for name, value in sorted(metrics.items())}}
        line = {name: value for name, value in line.items() if value is not None}
        with open(self.run_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        self.emit({"kind": "step", "metrics": line, "total_steps": self.total_training_steps})

    def export_student(self) -> Path:
        """The trained student as a Hugging Face folder, `student` in the run's folder."""
        folder = self.run_dir / "student"
        self.actor_rollout_wg.export_student(str(folder))
        return folder


def _plain(value: Any) -> float | int | str | None:
    """A JSON value: Python numbers for numpy's; None for what is not one number (and for NaN, which JSON lacks)."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, float | int | str) else None
