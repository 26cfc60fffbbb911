"""verl's agent loops, told how the step's rollouts are guided, and which of their tokens are corrections.

The values of the rollout policy's parameters travel with each request to the engine. The way back is described in
rollout/sampler.py: a positive log-probability marks a correction.
"""

from typing import Any

import ray
import torch
from verl.experimental.agent_loop import AgentLoopOutput
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ

from verl_trb.errors import RunError
from verl_trb.faults import explain
from verl_trb.guidance import guidance, step_policy
from verl_trb.policies import get_policy
from verl_trb.rollout.request import PARAMS, POLICY, SEED
from verl_trb.seeds import derive
from verl_trb.training import data_response

# The batch's field, int64 [response tokens]: 1 where the student's draft was rejected and replaced.
CORRECTED = "corrected"

# verl publishes the class only as a Ray actor class; this is the class behind it.
_AgentLoopWorker: Any = AgentLoopWorkerTQ.__ray_metadata__.modified_class


class MarkedOutput(AgentLoopOutput):
    """A rollout whose log-probabilities carried marks: both are fields of the batch, each by itself."""

    corrected: list[int]

    @classmethod
    def read(cls, output: AgentLoopOutput) -> "MarkedOutput":
        fields = {name: getattr(output, name) for name in output.model_fields_set}
        marked = output.response_logprobs or []
        fields["response_logprobs"] = [-abs(logp) for logp in marked]
        return cls(**fields, corrected=[int(logp > 0) for logp in marked])

    def as_dict(self) -> dict[str, Any]:
        fields = super().as_dict()
        fields[CORRECTED] = torch.tensor(fields[CORRECTED], dtype=torch.int64)
        return fields


@ray.remote
class DistillationAgentLoopWorker(_AgentLoopWorker):
    """Any of verl's agent loops, single or multi turn."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.failures: list[RunError] = []
        self.running = self.scoring = 0  # rollouts, now

    def waiting(self) -> dict[str, int]:
        """What this worker's rollouts wait for, with their numbers."""
        counts = {"the rollout engine": self.running - self.scoring, "the reward function": self.scoring}
        return {name: count for name, count in counts.items() if count > 0}

    def take_failures(self) -> list[RunError]:
        """What went wrong since the last call, one entry a rollout: verl itself only logs it and goes on without."""
        failures, self.failures = self.failures, []
        return failures

    async def _run_agent_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.running += 1
        try:
            return await self._run(*args, **kwargs)
        except Exception as error:
            self.failures.append(explain(error))
            raise
        finally:
            self.running -= 1

    async def _compute_score(self, *args: Any, **kwargs: Any) -> None:
        self.scoring += 1
        try:
            await super()._compute_score(*args, **kwargs)
        finally:
            self.scoring -= 1

    async def _run(self, sampling_params: dict[str, Any], trajectory: dict[str, Any], **kwargs: Any) -> Any:
        trb, step = self.config.trb, trajectory["step"]
        sample, session = int(trajectory["sample_index"]), int(kwargs.get("session_id", 0))
        if not trajectory["validate"] and data_response.takes_data(trb, step, sample, session):
            asked = {"column": trb.data_response, "step": step}
            kwargs["agent_name"] = data_response.NAME
            return await super()._run_agent_loop({"extra_args": asked}, trajectory, **kwargs)
        params = guidance(self.config.trb, trajectory["step"], trajectory["validate"])
        policy = step_policy(self.config.trb, trajectory["step"])
        extra_args: dict[str, Any] = {PARAMS: params, POLICY: policy}
        if trb.deterministic:
            # A validation prompt has no place in a batch: verl draws the names of those by chance.
            place = (sample, str(kwargs["raw_prompt"])) if trajectory["validate"] else kwargs["uid"]
            extra_args[SEED] = derive(trb.seed, step, trajectory["validate"], place, session)
        sampling_params = {**sampling_params, "extra_args": extra_args}
        return await super()._run_agent_loop(sampling_params, trajectory, **kwargs)

    async def _agent_loop_postprocess(self, output: Any, *args: Any, **kwargs: Any) -> None:
        if get_policy(self.config.trb.policy).marks_corrections:
            output = [MarkedOutput.read(one) for one in (output if isinstance(output, list) else [output])]
        await super()._agent_loop_postprocess(output, *args, **kwargs)


class DistillationAgentLoopManager(AgentLoopManagerTQ):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = DistillationAgentLoopWorker
