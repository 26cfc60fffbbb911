"""The socket through which a weight sync reaches the engine, named so that two runs on one machine never share it.

verl names it by the Ray job, and the first job of every Ray cluster has the same number: of two runs side by side, each
with a Ray of its own, one would send its student to the other's engine. The cluster's port tells them apart.
"""

import os
from typing import Any

import ray
from verl.workers.rollout.vllm_rollout import ServerAdapter

JOB = "VERL_RAY_JOB_ID"  # verl's, read by the engine's worker


def own_name(job: str, gcs_address: str) -> str:
    """The Ray job with the port of its cluster's head, which no other cluster on the machine has."""
    return f"{job}-{gcs_address.rpartition(':')[2]}"


def name_socket() -> None:
    """Tell the engine that this process is about to start; after verl has set its own name."""
    context = ray.get_runtime_context()
    os.environ[JOB] = own_name(context.get_job_id(), context.gcs_address)


class RolloutAdapter(ServerAdapter):
    """verl's worker-side adapter, which sends the weights, on our socket."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        context = ray.get_runtime_context()
        job = context.get_job_id()
        self.zmq_handle: str = self.zmq_handle.replace(job, own_name(job, context.gcs_address), 1)
