"""What to change where a job does not fit: every choice is computed, the smallest ones are named."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from verl_trb.planning.memory import Job, engine, kv_budget, most_sequences, phases

MOST_CHANGES, SHOWN = 4, 3
ENGINE, ACTOR = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"


def faults(job: Job) -> list[str]:
    """Why the job cannot run on its device, a sentence each; [] if it can."""
    found = []
    weights = sum(size for name, size in engine(job).items() if name.endswith("weights"))
    if job.kv_bytes is None and int(job.utilization * job.memory) <= weights:
        found.append(
            f"the engine's weights alone ({_gib(weights)}) exceed {ENGINE}.gpu_memory_utilization={job.utilization:g} "
            f"of a device's {_gib(job.memory)}"
        )
    elif most_sequences(job, job.length) < 1:
        found.append(
            f"the engine's KV cache of {_gib(kv_budget(job))} does not hold one sequence of {job.length:,} tokens "
            f"({_gib(job.kv_token * job.length)})"
        )
    for name, parts in phases(job).items():
        if (total := sum(parts.values())) > job.memory:
            largest = ", ".join(sorted(parts, key=lambda part: -parts[part])[:2])
            needs = f"the phase '{name}' needs {_gib(total)} of a device's {_gib(job.memory)}"
            found.append(f"{needs}; its largest parts are {largest}")
    return found


def remedies(job: Job) -> list[str]:
    """Overrides that make the job fit, as few at a time as possible, at most `SHOWN` choices; [] if nothing here does.

    Each choice is one string, overrides separated by spaces.
    """
    changes = list(_changes(job))
    for count in range(1, MOST_CHANGES + 1):
        found = []
        for chosen in itertools.combinations(changes, count):
            fields = [set(change) for _, change in chosen]
            if len(set().union(*fields)) == sum(map(len, fields)):  # no setting twice
                changed = replace(job, **{name: value for _, change in chosen for name, value in change.items()})
                if not faults(changed):
                    found.append(" ".join(override for override, _ in chosen))
            if len(found) == SHOWN:
                return found
        if found:
            return found
    return []


def _changes(job: Job) -> Iterator[tuple[str, dict[str, Any]]]:
    """Overrides and what they change, by what they cost: a smaller chunk nothing, offloading time at every step."""
    if job.host:
        return
    if job.chunk_tokens > 256:
        yield "trb.loss_chunk_tokens=256", {"chunk_tokens": 256}
    if not job.checkpointing:
        yield "actor_rollout_ref.model.enable_gradient_checkpointing=true", {"checkpointing": True}
    if job.micro_tokens > job.length:
        yield f"{ACTOR}.ppo_max_token_len_per_gpu={job.length}", {"micro_tokens": job.length}
    for seqs in (64, 16):
        if job.max_num_seqs > seqs:
            yield f"{ENGINE}.max_num_seqs={seqs}", {"max_num_seqs": seqs}
    if not job.sleeps:
        yield f"{ENGINE}.free_cache_engine=true {ENGINE}.enable_sleep_mode=true", {"sleeps": True}
    for share in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8):
        if share != job.utilization and job.kv_bytes is None:
            yield f"{ENGINE}.gpu_memory_utilization={share}", {"utilization": share}
    if not job.offload_optimizer:
        yield f"{ACTOR}.fsdp_config.optimizer_offload=true", {"offload_optimizer": True}
    if not job.offload_parameters:
        yield f"{ACTOR}.fsdp_config.param_offload=true", {"offload_parameters": True}
    if not job.offload_teacher:
        yield "trb.teacher.offload=true", {"offload_teacher": True}
    for parallel in (2, 4, 8):
        if job.tensor_parallel < parallel <= job.shards and not job.shards % parallel:
            override = f"{ENGINE}.tensor_model_parallel_size={parallel}"
            yield override, {"tensor_parallel": parallel}


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
