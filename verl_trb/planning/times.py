"""Seconds of a run's steps on a cluster, from the roofline and the share of drafts that the trust region lets pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from verl_trb.planning.devices import Cluster, Device
from verl_trb.planning.job import Workload
from verl_trb.planning.memory import Job, most_sequences
from verl_trb.planning.roofline import guided_rate, student_rate, training_flops


@dataclass(frozen=True)
class StepTime:
    """Seconds, at the peaks of the data sheet. rate: rollout tokens a second of the whole cluster."""

    rollouts: float
    update: float
    rate: float

    @property
    def step(self) -> float:
        return self.rollouts + self.update


def step_time(job: Job, work: Workload, cluster: Cluster, tv: float | None) -> StepTime:
    """One step. tv: total variation of guided rollouts, i.e. the share of drafts rejected; None for the student's own.

    Rollouts end when the last sequence does: neither can they be faster than all their tokens at the batch's rate, nor
    than the longest response alone.
    """
    replicas = max(cluster.devices // job.tensor_parallel, 1)
    sequences = -(-work.sequences // replicas)
    context = work.prompt + work.mean_response / 2
    batch = max(min(sequences, job.max_num_seqs, most_sequences(job, context)), 1)
    rate = _rate(job, cluster.device, batch, context, tv)
    alone = _rate(job, cluster.device, 1, context, tv)
    seconds = max(sequences * work.mean_response / rate, work.response / alone)
    tokens = work.sequences * (work.prompt + work.mean_response)
    flops = tokens * training_flops(job.student, job.teacher, job.checkpointing, job.adapters)
    rollout_tokens = work.sequences * work.mean_response
    return StepTime(seconds, flops / (cluster.devices * cluster.device.flops), rollout_tokens / seconds)


def run_seconds(job: Job, work: Workload, cluster: Cluster, tvs: Sequence[float | None]) -> float:
    """All steps, one entry of `tvs` each."""
    times = {tv: step_time(job, work, cluster, tv).step for tv in set(tvs)}
    return sum(times[tv] for tv in tvs)


def _rate(job: Job, device: Device, batch: int, context: float, tv: float | None) -> float:
    """Tokens a second of one replica; its devices share a pass's reading and computing."""
    whole = replace(device, bandwidth=job.tensor_parallel * device.bandwidth, flops=job.tensor_parallel * device.flops)
    if tv is None:
        return student_rate(job.student, whole, batch, context, element_bytes=job.engine)
    drafts = job.draft_tokens
    return guided_rate(job.student, job.teacher, whole, batch, context, drafts, tv, element_bytes=job.engine)
