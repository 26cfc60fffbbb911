"""verl's synchronous trainer with our worker, the ε schedule, and one metrics line a step."""

import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import ray
import transfer_queue as tq
from tensordict import TensorDict
from verl.utils.profiler.performance import marked_timer
from verl.utils.tensordict_utils import assign_non_tensor_stack
from verl.workers.utils.padding import response_from_nested, response_to_nested

import verl_trb.rollout.server  # noqa: F401  registers the rollout engine with verl in this process
from verl_trb import guard_rails
from verl_trb.errors import ComponentLost, RunError
from verl_trb.guidance import guidance_metrics, last_teacher_step
from verl_trb.objective import objective_metrics, step_objective
from verl_trb.policies import get_policy
from verl_trb.rollout.statistics import merge, rollout_metrics
from verl_trb.timeline import Spans, Timings, write_step
from verl_trb.training.advantage import distillation_advantages
from verl_trb.training.agent_loop import CORRECTED, GroupingClient
from verl_trb.training.checkpointing import CheckpointingTrainer
from verl_trb.training.loss import ADVANTAGES, OBJECTIVE
from verl_trb.training.samples import SampleRecorder
from verl_trb.training.worker import DistillationWorker
from verl_trb.verified import TEACHER_HIDDEN, VERIFIED

Event = dict[str, Any]
MAX_SKIPPED = 3  # updates in a row that were left out because the gradient was not finite
# What verl's worker and our loss read in an update. The data set's own fields stay in TransferQueue.
UPDATE_FIELDS = {
    "input_ids", "position_ids", "prompts", "responses", "response_mask", "loss_mask", "rollout_log_probs",
    "old_log_probs", "advantages", "returns", "rollout_is_weights", "ref_log_prob", "routed_experts",
    ADVANTAGES, CORRECTED, TEACHER_HIDDEN, VERIFIED,
}  # fmt: skip
TIMES = ("timing", "perf/time_per_step", "perf/throughput")  # metrics that a step has when it is over
SPANS_SHOWN = 300  # of the rollouts of a step: more would only fill the disk


class DistillationTrainer(CheckpointingTrainer):
    """`emit` receives the events the display shows: stages, and every step's metrics. `restarts`: how often the driver
    has started this run again.
    """

    def __init__(self, config: Any, emit: Callable[[Event], None], restarts: int = 0) -> None:
        self.emit, self.run_dir, self.restarts = emit, Path(config.trb.run_dir), restarts
        super().__init__(config)
        self.pending: dict[str, float] = {}
        self.skipped = 0  # updates left out, the last ones in a row
        self.written = 0  # the last step whose rollouts are in trainer.rollout_data_dir
        self.history: deque[dict[str, Any]] = deque(maxlen=guard_rails.WINDOW + 1)
        self.warned: dict[str, int] = {}  # what was warned about, and when
        self.spans = Spans("trainer")
        self.step_began = self.step_ended = self.recorded_from = 0.0
        self.beside = ThreadPoolExecutor(max_workers=1)  # for what is only recorded, while the worker learns
        self.recording: Future[Any] | None = None

    @property
    def timing_raw(self) -> Timings:
        """verl's timers of the step. verl assigns a plain dictionary at every step."""
        return self._timings

    @timing_raw.setter
    def timing_raw(self, empty: dict[str, float]) -> None:
        self._timings = Timings(self.spans)

    # ------------------------------------------------------------------ set-up

    def _init_resource_pool_mgr(self) -> None:
        self.role_worker_mapping: dict[Any, Any] = {}
        super()._init_resource_pool_mgr()
        self.role_worker_mapping = {role: ray.remote(DistillationWorker) for role in self.role_worker_mapping}

    def get_llm_client(self) -> Any:
        alone = len(self.llm_server_manager.get_replicas()) == 1
        return self.llm_server_manager.get_client(client_cls=GroupingClient, alone=alone)

    def _setup(self) -> None:
        self.emit({"kind": "stage", "text": "loading student and teacher, starting the rollout engine"})
        self.now("loading student and teacher, starting the rollout engine")
        super()._setup()

    def on_init_end(self) -> None:
        super().on_init_end()
        self.watch_servers(self._servers())
        self.samples = SampleRecorder(self.config, self.tokenizer, self.val_dataset, self.total_training_steps)
        self.last_teacher_step = last_teacher_step(self.config.trb, self.total_training_steps)
        self.emit({"kind": "ready", "step": self.global_steps, "total_steps": self.total_training_steps})

    # ------------------------------------------------------------------ one step

    def _next_train_batch(self, num_prompts: int | None = None) -> TensorDict:
        batch = super()._next_train_batch(num_prompts)
        if self.config.trb.deterministic:  # names by place instead of by chance: seeds and order follow from them
            names = [f"{self.global_steps:09}-{place:06}" for place in range(len(batch))]
            assign_non_tensor_stack(batch, "uid", names)
        return batch

    def _balance_batch(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if self.config.trb.deterministic:  # else in the order in which the rollouts were done
            batch.reorder(sorted(range(len(batch)), key=lambda place: batch.keys[place]))
        return super()._balance_batch(batch, *args, **kwargs)

    def on_step_begin(self) -> None:
        self.spans.take()
        self.step_began = time.time()
        if self.recorded_from:
            self.timing_raw["between"] = self.step_began - self.recorded_from
        self.now(f"the rollouts of step {self.global_steps}")
        if self.samples.due(self.global_steps):
            with marked_timer("samples", self.timing_raw):
                self.samples.record(self.global_steps, self.llm_server_manager.get_replicas()[0].servers[0])
            ray.get(self._ask_rollout_sums())  # not the step's
        if self.config.trb.release_teacher and self.global_steps > self.last_teacher_step:
            self._release_teacher()
        self.objective = step_objective(self.config.trb, self.global_steps)
        # verl asks at every step: only a policy gradient needs the student's log-probabilities before the update.
        self.config.algorithm.rollout_correction.bypass_mode = not self.objective.policy_gradient

    def step(self, metrics: dict, timing_raw: dict) -> Any:
        try:
            self.trained = super().step(metrics, timing_raw), metrics
            return self.trained[0]
        except (RunError, ray.exceptions.RayError):
            raise
        except Exception:
            self._take_failures(self._rollouts)  # says why, where verl has no rollouts to train on
            raise

    @property
    def _rollouts(self) -> int:
        return self.config.data.train_batch_size * self.config.actor_rollout_ref.rollout.n

    def prepare_step(self) -> dict:
        with marked_timer("submit", self.timing_raw):
            return super().prepare_step()

    def on_sample_end(self) -> None:
        self.now(f"the training of step {self.global_steps}")
        asked = self._ask_rollout_sums()
        failed = self._take_failures(self._rollouts)
        sums = merge(ray.get(asked))
        if bad := [name for name in ("student", "teacher") if sums.get(f"{name}_nan")]:
            count, whose = sum(int(sums[f"{name}_nan"]) for name in bad), " and the ".join(bad)
            raise RunError(
                f"step {self.global_steps}: the rollout engine got NaN or infinite logits of the {whose} "
                f"at {count} positions: look for NaN in its weights, or try actor_rollout_ref.rollout.dtype=float32; "
                "trainer.resume_mode=resume_path goes on from an earlier checkpoint"
            )
        self.pending = rollout_metrics(sums)
        self.pending["trb/resubmitted"] = sums.get("resubmitted", 0.0)
        self.pending["trb/failed_rollouts"] = failed
        super().on_sample_end()

    def on_step_end(self) -> None:
        self.now(f"sending the weights of step {self.global_steps} to the rollout engine")
        super().on_step_end()
        self.step_ended = time.time()

    def _take_failures(self, rollouts: int) -> float:
        """How many of `rollouts` failed since the last call, with a warning that says why.

        Raises RunError if all did, ComponentLost if a process has died.
        """
        workers = self.agent_loop_manager.agent_loop_workers
        failures: list[RunError] = []
        for failed, spans in ray.get([worker.take_failures.remote() for worker in workers]):
            failures += failed
            self.spans.noted += spans[: SPANS_SHOWN // len(workers)]
        if lost := next((failure for failure in failures if isinstance(failure, ComponentLost)), None):
            raise ComponentLost(f"{lost}; {len(failures)} of {rollouts} rollouts of step {self.global_steps} failed")
        if len(failures) >= rollouts:
            raise RunError(f"all {rollouts} rollouts of step {self.global_steps} failed, with {failures[0]}")
        if failures:
            said = f"{len(failures)} of {rollouts} rollouts failed and were left out, the first with {failures[0]}"
            self.emit({"kind": "warning", "text": f"step {self.global_steps}: {said}"})
        return float(len(failures))

    def _servers(self) -> list[Any]:
        return [server for replica in self.llm_server_manager.get_replicas() for server in replica.servers]

    def _ask_rollout_sums(self) -> list[Any]:
        return [server.take_rollout_statistics.remote() for server in self._servers()]

    def _release_teacher(self) -> None:
        """In the rollout engines; a resumed run whose warm-up is over does it at its first step."""
        ray.get([server.release_teacher.remote() for server in self._servers()])

    def _compute_old_log_prob(self, batch: Any, metrics: dict) -> Any:
        if not self.objective.policy_gradient and not self.config.algorithm.use_kl_in_reward:
            return batch  # nothing reads them; verl would copy the rollouts' own
        if self.objective.samples:  # the teacher's log-probabilities in the same pass
            batch.extra_info[OBJECTIVE] = self.objective.as_dict()
        batch = super()._compute_old_log_prob(batch, metrics)
        batch.extra_info.pop(OBJECTIVE, None)
        return batch

    def _compute_advantage(self, batch: Any, metrics: dict) -> Any:
        """verl's, of the reward, with the weights of its rollout correction; beside them those of a single-sample
        distillation loss. Without a policy gradient they are metrics only, and need not be waited for.
        """
        if not self.objective.policy_gradient and self.processor is None:  # of pictures the worker reads more fields
            self.recording = self.beside.submit(super()._compute_advantage, batch, metrics)
            batch.fields = sorted(UPDATE_FIELDS - {"advantages", "returns"})  # which are being written
            return batch
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
        if self.processor is None and batch.fields is not None:
            batch.fields = [field for field in batch.fields if field in UPDATE_FIELDS]
        updated: dict[str, Any] = {}
        batch = super()._update_actor(batch, updated)
        if self.recording is not None:
            self.recording.result()
            self.recording = None
        metrics.update(updated)
        spans_by_rank = self.actor_rollout_wg.take_spans()
        self.spans.noted += spans_by_rank[0]
        self.timing_raw["teacher"] = max(
            sum(span.end - span.start for span in spans if span.name == "teacher") for spans in spans_by_rank
        )
        for name in ("reverse_kl", "teacher_entropy", "student_entropy", "teacher_logprob"):
            if f"actor/{name}" in metrics:  # not without the teacher
                self.pending[f"trb/{name}"] = metrics.pop(f"actor/{name}")
        # verl leaves out an update whose gradient is not finite, and says so in a log only.
        skipped = not math.isfinite(metrics.get("actor/grad_norm", 0.0))
        self.pending["trb/skipped_updates"] = float(skipped)
        self.skipped = self.skipped + 1 if skipped else 0
        if self.skipped == MAX_SKIPPED:
            raise RunError(
                f"the gradient was not finite at {MAX_SKIPPED} steps in a row, until step {self.global_steps}: lower "
                "actor_rollout_ref.actor.optim.lr, or look for NaN in the models' weights"
            )
        # log μ − log π_S with π_S from the trainer: what the engine sampled against what is trained.
        self.pending["trb/log_ratio_trainer"] = metrics.pop("actor/log_ratio", math.nan)
        return batch

    # ------------------------------------------------------------------ what is recorded

    def _validate(self) -> dict[str, float]:
        self.now(f"the validation at step {self.global_steps}")
        started = time.perf_counter()
        rollouts = len(self.val_dataset) * self.config.actor_rollout_ref.rollout.val_kwargs.n
        try:
            metrics = super()._validate()
        finally:
            self._take_failures(rollouts)  # says why, where verl has no answers to average
        ray.get(self._ask_rollout_sums())  # not the next step's
        core = {  # by source: val-core/SOURCE/acc/mean@1
            name.removeprefix("val-core/").rsplit("/", 2)[0]: value
            for name, value in metrics.items()
            if name.startswith("val-core/") and "/mean@" in name
        }
        if core:
            metrics["val/accuracy"] = float(np.mean(list(core.values())))
        if len(core) > 1:
            metrics.update({f"val/{source}": float(value) for source, value in core.items()})
        if not self.step_began:  # validation before the first step
            self._record({**metrics, "timing_s/testing": time.perf_counter() - started}, self.global_steps)
        return metrics

    def _compute_metrics(self, batch: Any, metrics: dict, timing_raw: dict, global_steps: int, epoch: int) -> None:
        self.recorded_from = time.time()
        write_step(self.run_dir, global_steps, self.step_began, self.step_ended, self.spans.take())
        timing_raw["other"] = timing_raw["step"] - self.timing_raw.parts()
        self._describe(batch, metrics, timing_raw, global_steps, epoch)
        self._record(metrics, global_steps)

    def step_line(self) -> dict[str, Any]:
        batch, metrics = self.trained
        step, metrics = self.global_steps, dict(metrics)
        # The times are not complete; verl computes a throughput from them.
        self._describe(batch, metrics, {**self.timing_raw, "step": 1.0}, step, (step - 1) // self.steps_per_epoch)
        return {name: value for name, value in _line(metrics, step).items() if not name.startswith(TIMES)}

    def write_rollouts(self) -> None:
        if folder := self.config.trainer.get("rollout_data_dir"):
            self._log_rollout_data(self.trained[0], {}, folder)
            for writing in self._dump_futures:
                writing.result()

    def _log_rollout_data(self, batch: Any, timing_raw: dict, rollout_data_dir: str) -> None:
        """verl's, which asks at the end of every step: not again for one that was written at its checkpoint."""
        if self.written != self.global_steps:
            self.written = self.global_steps
            super()._log_rollout_data(batch, timing_raw, rollout_data_dir)

    def _describe(self, batch: Any, metrics: dict, timing_raw: dict, global_steps: int, epoch: int) -> None:
        """Adds what the step's batch, objective and rollouts say to `metrics`."""
        super()._compute_metrics(batch, metrics, timing_raw, global_steps, epoch)
        metrics.update(self.pending)
        metrics.update(objective_metrics(self.objective))
        metrics.update(guidance_metrics(self.config.trb, global_steps))
        if get_policy(self.config.trb.policy).marks_corrections:
            data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=[CORRECTED])
            metrics["trb/corrected"] = float(data[CORRECTED].values().double().mean())
        metrics["trb/eos_rate"] = float(np.mean([tag["ended"] for tag in batch.tags if not tag.get("is_padding")]))
        metrics["reward/mean"] = metrics["critic/score/mean"]
        metrics["trb/restarts"] = self.restarts

    def _record(self, metrics: dict[str, Any], step: int) -> None:
        """Append the step to metrics.jsonl, and show it."""
        line = _line(metrics, step)
        self.append_line(line)
        self.emit({"kind": "step", "metrics": line, "total_steps": self.total_training_steps})
        if step > 0:
            self._warn(line)

    def _warn(self, line: dict[str, Any]) -> None:
        """What is odd about the step just recorded, each thing at most once in as many steps as it is compared with."""
        step = line["step"]
        self.history.append(line)
        for what, text in guard_rails.warnings(list(self.history), self.config.trb.warn):
            if step - self.warned.get(what, -guard_rails.WINDOW) >= guard_rails.WINDOW:
                self.warned[what] = step
                self.emit({"kind": "warning", "text": f"step {step}: {text}"})

    def export_student(self) -> Path:
        """The trained student as a Hugging Face folder, `student` in the run's folder."""
        self.now("the export of the student")
        folder = self.run_dir / "student"
        self.actor_rollout_wg.export_student(str(folder))
        return folder


def _line(metrics: dict[str, Any], step: int) -> dict[str, Any]:
    line = {"step": step, **{name: _plain(value) for name, value in sorted(metrics.items())}}
    return {name: value for name, value in line.items() if value is not None}


def _plain(value: Any) -> float | int | str | None:
    """A JSON value: Python numbers for numpy's; None for what is not one number (and for NaN, which JSON lacks)."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, float | int | str) else None
