"""From a composed configuration and a cluster to the numbers that memory.py and roofline.py work with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from verl_trb import preflight
from verl_trb.errors import UserError
from verl_trb.planning.devices import CPU, GIB, Cluster
from verl_trb.planning.memory import Job
from verl_trb.planning.shapes import shape_of
from verl_trb.setting_checks import batch_table

BYTES = {"fp32": 4, "float32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2, "half": 2, "auto": 2}
# Of a GPU: contexts of CUDA and NCCL of two processes, and what the allocators cannot use. An assumption.
GPU_RESERVE = 3 * GIB
# Of a CPU run: the interpreters with torch, verl, vLLM and Ray, whatever the models. A guess that
# scripts/check_plan.py is to replace.
CPU_RESERVE = int(3.5 * GIB)


@dataclass(frozen=True)
class Workload:
    """A step's work. mean_response: tokens of a response on average, which nobody knows beforehand."""

    sequences: int
    prompt: int
    response: int
    mean_response: int
    steps: int | None


def job_of(config: DictConfig, cluster: Cluster) -> Job:
    """Raises UserError for models whose shapes are unknown and for sizes that do not divide."""
    actor, rollout, data = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.data
    fsdp, trb = actor.fsdp_config, config.trb
    parallel = int(rollout.tensor_model_parallel_size)
    if cluster.devices % parallel:
        raise UserError(
            f"actor_rollout_ref.rollout.tensor_model_parallel_size={parallel} does not divide the {cluster.devices} "
            "devices of the cluster."
        )
    host = cluster.device.name == CPU
    sequences = batch_table(config)["mini-batch, sequences"] // cluster.devices
    length = data.max_prompt_length + data.max_response_length
    if actor.use_dynamic_bsz:
        micro_tokens = actor.ppo_max_token_len_per_gpu
        micro_batches = -(-sequences * length // micro_tokens)
    else:
        micro_tokens = (actor.ppo_micro_batch_size_per_gpu or 1) * length
        micro_batches = -(-sequences // (actor.ppo_micro_batch_size_per_gpu or 1))
    compute = (fsdp.get("mixed_precision") or {}).get("param_dtype", "bf16")
    vllm: Any = (rollout.get("engine_kwargs") or {}).get("vllm") or {}
    size = int(fsdp.get("fsdp_size", -1) or -1)
    model = config.actor_rollout_ref.model
    student = shape_of(preflight.STUDENT, model.path)
    targets = model.target_modules if isinstance(model.target_modules, str) else list(model.target_modules or [])
    return Job(
        student=student,
        teacher=shape_of(preflight.TEACHER, trb.teacher.path),
        memory=cluster.device.memory,
        shards=cluster.devices if size < 1 else min(size, cluster.devices),
        tensor_parallel=parallel,
        adapters=student.adapters(model.lora_rank, targets),
        master=BYTES[str(fsdp.get("model_dtype") or "fp32")],
        compute=BYTES[str(compute)],
        teacher_bytes=BYTES[str(trb.teacher.dtype or rollout.dtype)],
        engine=BYTES[str(rollout.dtype)],
        prompt=data.max_prompt_length,
        response=data.max_response_length,
        max_num_seqs=rollout.max_num_seqs,
        draft_tokens=trb.draft_tokens,
        utilization=rollout.gpu_memory_utilization,
        kv_bytes=vllm.get("kv_cache_memory_bytes"),
        micro_tokens=min(micro_tokens, max(sequences, 1) * length),
        micro_batches=max(micro_batches, 1),
        chunk_tokens=trb.loss_chunk_tokens,
        loss=trb.loss,
        checkpointing=bool(model.enable_gradient_checkpointing),
        offload_teacher=trb.teacher.offload and not host,
        offload_parameters=fsdp.param_offload and not host,
        offload_optimizer=fsdp.optimizer_offload and not host,
        sleeps=bool(rollout.free_cache_engine) and not host,
        reserve=CPU_RESERVE if host else GPU_RESERVE,
        host=host,
    )


def workload_of(config: DictConfig, mean_response: int | None) -> Workload:
    """mean_response: None takes half of what is allowed."""
    longest = config.data.max_response_length
    return Workload(
        sequences=config.data.train_batch_size * config.actor_rollout_ref.rollout.n,
        prompt=config.data.max_prompt_length,
        response=longest,
        mean_response=min(mean_response or max(longest // 2, 1), longest),
        steps=config.trainer.total_training_steps,
    )
