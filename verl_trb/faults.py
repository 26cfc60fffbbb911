"""What went wrong, in one sentence that names the component: errors that crossed processes carry whole tracebacks."""

import re

import ray

from verl_trb.errors import ComponentLost, RunError

# Class names in Ray's messages, by what a user calls them.
COMPONENTS = {
    "WorkerDict": "a training worker",
    "DistillationAgentLoopWorker": "a rollout worker",
    "AgentLoopWorkerTQ": "a rollout worker",  # the same one: Ray names a subclass of an actor class by its base
    "BlendedHttpServer": "the rollout engine's server",
    "RewardLoopWorker": "a reward worker",
    "GlobalRequestLoadBalancer": "the load balancer of the rollout engines",
    "DistillationTaskRunner": "the trainer",
    "TransferQueueController": "the transfer queue",
    "SimpleStorageUnit": "the transfer queue's storage",
}
ENGINE_DEAD = ("EngineDeadError", "EngineGenerateError")  # vLLM's: its core process has ended
# What torch.distributed's backends say where the other side of a collective has gone: a rank's process, or its node.
PEER_GONE = re.compile(r"(gloo|NCCL).*(Connection (reset|closed) by peer|Broken pipe|remote process exited)", re.DOTALL)
CLASS_NAME = re.compile(r"class_name: \S*?(\w+)\s")


def explain(error: BaseException, doing: str = "") -> RunError:
    """The error as one sentence; ComponentLost if a process is gone.

    doing: what the run was at, for the sentence.
    """
    cause = innermost(error)
    if isinstance(cause, RunError):
        return cause
    during = f" during {doing}" if doing else ""
    if type(cause).__name__ in ENGINE_DEAD:
        return ComponentLost(f"the rollout engine's process ended{during} (its output is in logs/)")
    if isinstance(cause, ray.exceptions.RayActorError) and not cause.actor_init_failed:
        match = CLASS_NAME.search(str(cause))
        name = match[1] if match else ""
        return ComponentLost(f"{COMPONENTS.get(name, name or 'a process')} died{during}")
    if isinstance(cause, RuntimeError) and PEER_GONE.search(str(cause)):
        return ComponentLost(f"a training worker died or its node was lost{during} (another one lost its connection)")
    lost = (
        ray.exceptions.WorkerCrashedError,
        ray.exceptions.ObjectLostError,
        ray.exceptions.LocalRayletDiedError,
        ray.exceptions.NodeDiedError,
        ray.exceptions.RaySystemError,
    )
    if isinstance(cause, lost):
        return ComponentLost(f"Ray lost a process or a node{during} ({first_line(cause)})")
    return RunError(f"{doing}: {first_line(cause)}" if doing else first_line(cause))


def innermost(error: BaseException) -> BaseException:
    """What was raised first, where Ray has wrapped it once a process."""
    while isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def first_line(error: BaseException) -> str:
    """The innermost cause's kind and its message's last line (the first ones can be a traceback)."""
    cause = innermost(error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1] if lines else ''}"
