"""verl's agent loop, told ε: the trust-region radius of the step travels with each request to the engine."""

from typing import Any

import ray
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ

from verl_trb.rollout.request import EPSILON
from verl_trb.schedules import annealed_epsilon


def step_epsilon(trb: Any, step: int, validate: bool) -> float:
    """ε (nats per token) of a training step's rollouts; validation is by the student alone."""
    if validate or trb.policy == "student":
        return 0.0
    return annealed_epsilon(step, trb.epsilon, trb.warmup_steps)


# verl publishes the class only as a Ray actor class; this is the class behind it.
_AgentLoopWorker: Any = AgentLoopWorkerTQ.__ray_metadata__.modified_class


@ray.remote
class DistillationAgentLoopWorker(_AgentLoopWorker):
    """Any of verl's agent loops, single or multi turn, with ε in the sampling parameters."""

    async def _run_agent_loop(self, sampling_params: dict[str, Any], trajectory: dict[str, Any], **kwargs: Any) -> Any:
        epsilon = step_epsilon(self.config.trb, trajectory["step"], trajectory["validate"])
        sampling_params = {**sampling_params, "extra_args": {EPSILON: epsilon}}
        return await super()._run_agent_loop(sampling_params, trajectory, **kwargs)


class DistillationAgentLoopManager(AgentLoopManagerTQ):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = DistillationAgentLoopWorker
