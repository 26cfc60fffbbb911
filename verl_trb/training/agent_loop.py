"""verl's agent loops, told how the step's rollouts are guided, and which of their tokens are corrections.

The values of the rollout policy's parameters travel with each request to the engine. The way back is described in
rollout/sampler.py: a positive log-probability marks a correction.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import hydra
import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from tensordict import NonTensorData, TensorDict
from verl.experimental.agent_loop import AgentLoopOutput, get_trajectory_info
from verl.experimental.agent_loop import agent_loop as verl_loops
from verl.experimental.agent_loop.agent_loop import DictConfigWrap, ToolListWrap
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.utils.rollout_trace import rollout_trace_attr
from verl.workers.rollout.llm_server import LLMServerClient

from verl_trb.agent_loops import ONE_TURN
from verl_trb.errors import RunError
from verl_trb.faults import explain
from verl_trb.guidance import guidance, step_policy
from verl_trb.objective import reused_of_teacher
from verl_trb.policies import get_policy
from verl_trb.rollout.request import KEEP, PARAMS, POLICY, SEED
from verl_trb.rollout.request_groups import GroupingServer
from verl_trb.seeds import derive
from verl_trb.timeline import Span, Spans
from verl_trb.training import data_response
from verl_trb.training.columns import Columns
from verl_trb.training.group_commit import GroupCommit
from verl_trb.training.reward_groups import RewardGroups
from verl_trb.verified import TEACHER_HIDDEN, VERIFIED, from_bytes

logger = logging.getLogger(__name__)

# The batch's field, int64 [response tokens]: 1 where the student's draft was rejected and replaced.
CORRECTED = "corrected"

OF_TEACHER = (VERIFIED, TEACHER_HIDDEN)  # what `trb.reuse_verification` keeps

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


class Status(NamedTuple):
    """That a prompt is "running", "finished" or "failure"."""

    partition: str
    key: str
    status: str


class Row(NamedTuple):
    """A rollout's place, fields and tag in TransferQueue."""

    partition: str
    key: str
    fields: dict[str, Any]
    tag: dict[str, Any]


async def put_statuses(statuses: list[Status]) -> None:
    for partition in {one.partition for one in statuses}:
        tags = {one.key: {"status": one.status} for one in statuses if one.partition == partition}
        await tq.async_kv_batch_put(keys=list(tags), partition_id=partition, tags=list(tags.values()))


async def put_rows(rows: list[Row]) -> None:
    """One put for all rows of a kind: of the same partition, with the same fields."""
    kinds: dict[Any, list[Row]] = {}
    for row in rows:
        kinds.setdefault((row.partition, frozenset(row.fields)), []).append(row)
    for (partition, _), alike in kinds.items():
        tags = [row.tag for row in alike]
        await tq.async_kv_batch_put([row.key for row in alike], partition, Columns([row.fields for row in alike]), tags)


class Prompts(NamedTuple):
    """A batch of prompts: fields that are the same for all, and columns of those that are not.

    Out of verl's tensordict, in which every value has a wrapper: to pickle it, and to take row after row out of it,
    takes half a millisecond a prompt, before the first rollout starts.
    """

    same: dict[str, Any]
    rows: dict[str, torch.Tensor | list[Any]]

    @classmethod
    def of(cls, batch: TensorDict) -> "Prompts":
        fields = {name: batch.get(name) for name in batch.keys()}  # noqa: SIM118
        same = {name: value.data for name, value in fields.items() if isinstance(value, NonTensorData)}
        rows = {name: value for name, value in fields.items() if name not in same}
        return cls(same, {name: v if isinstance(v, torch.Tensor) else v.tolist() for name, v in rows.items()})


class GroupingClient(LLMServerClient):
    """verl's client, whose requests reach a server in groups. Where there is one server, the load balancer, a process
    to be asked before and after each rollout, is asked once.
    """

    def __init__(self, *args: Any, alone: bool, **kwargs: Any) -> None:
        """alone: there is one server."""
        super().__init__(*args, **kwargs)
        self.alone = alone
        self.servers: dict[str, GroupingServer] = {}

    async def _acquire_server(self, request_id: str, **extra: Any) -> tuple[str, Any]:
        if self.alone and self.servers:
            return next(iter(self.servers.items()))
        name, handle = await super()._acquire_server(request_id, **extra)
        return name, self.servers.setdefault(name, GroupingServer(handle))

    def _release_server(self, server_id: str, request_id: str | None = None) -> None:
        if not self.alone:
            super()._release_server(server_id, request_id)


def partition_of(validate: bool) -> str:
    return "val" if validate else "train"


@ray.remote
class DistillationAgentLoopWorker(_AgentLoopWorker):
    """Any of verl's agent loops, single or multi turn."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Plain: every rollout reads a dozen of these settings, and OmegaConf takes 50 µs for each.
        self.trb = SimpleNamespace(**OmegaConf.to_container(self.config.trb, resolve=True))
        self.failures: list[RunError] = []
        self.running = self.scoring = 0  # rollouts, now
        self.spans = Spans("rollouts")
        self.makers: dict[str, Callable[..., Any]] = {}
        self.rewards = RewardGroups(self.reward_loop_worker_handles or [])
        self.statuses, self.rows = GroupCommit(put_statuses), GroupCommit(put_rows)

    def waiting(self) -> dict[str, int]:
        """What this worker's rollouts wait for, with their numbers."""
        counts = {"the rollout engine": self.running - self.scoring, "the reward function": self.scoring}
        return {name: count for name, count in counts.items() if count > 0}

    def take_failures(self) -> tuple[list[RunError], list[Span]]:
        """What went wrong since the last call, one entry a rollout: verl itself only logs it and goes on without.
        And when the rollouts ran.
        """
        failures, self.failures = self.failures, []
        return failures, self.spans.take()

    async def rollouts_ended(self) -> None:
        """Returns when all prompts that were given to this worker have ended."""
        while self.background_tasks:
            await asyncio.wait(self.background_tasks)

    async def _run_agent_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.running += 1
        try:
            return await self._run(*args, **kwargs)
        except Exception as error:
            self.failures.append(explain(error))
            raise
        finally:
            self.running -= 1

    async def _run(self, sampling_params: dict[str, Any], trajectory: dict[str, Any], **kwargs: Any) -> Any:
        trb, step = self.trb, trajectory["step"]
        sample, session = int(trajectory["sample_index"]), int(kwargs.get("session_id", 0))
        if not trajectory["validate"] and data_response.takes_data(trb, step, sample, session):
            asked = {"column": trb.data_response, "step": step}
            kwargs["agent_name"] = data_response.NAME
            return await self._one_rollout({"extra_args": asked}, trajectory, **kwargs)
        params, policy = guidance(trb, step, trajectory["validate"]), step_policy(trb, step)
        extra_args: dict[str, Any] = {PARAMS: params, POLICY: policy}
        keep = None if trajectory["validate"] else reused_of_teacher(trb, step)
        if keep is not None:
            if kwargs["agent_name"] != ONE_TURN:
                raise RunError(
                    f"trb.reuse_verification=true knows the teacher at the tokens of one turn, but the agent loop is "
                    f"{kwargs['agent_name']}; set it to false"
                )
            extra_args[KEEP] = keep
        if trb.deterministic:
            # A validation prompt has no place in a batch: verl draws the names of those by chance.
            place = (sample, str(kwargs["raw_prompt"])) if trajectory["validate"] else kwargs["uid"]
            extra_args[SEED] = derive(trb.seed, step, trajectory["validate"], place, session)
        sampling_params = {**sampling_params, "extra_args": extra_args}
        return await self._one_rollout(sampling_params, trajectory, **kwargs)

    async def _one_rollout(
        self,
        sampling_params: dict[str, Any],
        trajectory: dict[str, Any],
        *,
        agent_name: str,
        trace: bool = True,
        **kwargs: Any,
    ) -> Any:
        """What verl's own `_run_agent_loop` does. It has Hydra make the agent loop anew from its configuration, which
        took a quarter of this process's time; here Hydra is asked once for each name.
        """
        attributes = {name: trajectory[name] for name in ("step", "sample_index", "rollout_n", "validate")}
        with rollout_trace_attr(**attributes, name="agent_loop", trace=trace):
            # By its module: Ray copies this class with the globals it uses, and verl fills the one that is not copied.
            registry = verl_loops._agent_loop_registry
            if agent_name not in registry:
                raise ValueError(f"there is no agent loop {agent_name!r}; there are {', '.join(registry)}")
            if agent_name not in self.makers:
                entry = {**registry[agent_name], "_partial_": True}
                self.makers[agent_name] = hydra.utils.instantiate(entry)
            agent_loop = self.makers[agent_name](
                trainer_config=DictConfigWrap(config=self.config),
                server_manager=self.llm_client,
                tokenizer=self.tokenizer,
                processor=self.processor,
                hf_model_type=self.hf_model_type,
                dataset_cls=self.dataset_cls,
                data_config=DictConfigWrap(self.config.data),
                tools=ToolListWrap(self.tools),
            )
            with self.spans.during("generate"):
                output = await agent_loop.run(sampling_params, **kwargs)
            return await self._agent_loop_postprocess(output, trajectory["validate"], **kwargs)

    async def generate_sequences(self, batch: Prompts) -> None:
        """Starts the rollouts of a batch and returns."""
        same, rows, rollout = dict(batch.same), batch.rows, self.config.actor_rollout_ref.rollout
        validate = same.pop("validate", False)
        if "agent_name" not in rows:
            same.setdefault("agent_name", rollout.agent.default_agent_loop)
        sampled = rollout.val_kwargs if validate else rollout
        sampling_params = {name: sampled[name] for name in ("temperature", "top_p", "top_k")}
        sampling_params |= {"repetition_penalty": 1.0, "logprobs": rollout.calculate_log_probs}
        trajectories = await get_trajectory_info(same["global_steps"], rows["index"], validate)
        for i, trajectory in enumerate(trajectories):
            prompt = same | {name: column[i] for name, column in rows.items()}
            task = asyncio.create_task(self._run_prompt(prompt, sampling_params, trajectory))
            self.background_tasks.add(task)
            task.add_done_callback(self.background_tasks.discard)

    async def _run_prompt(
        self, prompt: dict[str, Any], sampling_params: dict[str, Any], trajectory: dict[str, Any], trace: bool = False
    ) -> None:
        """All rollouts of a prompt; what verl's own does, with the writes to TransferQueue grouped.

        A prompt is "finished" when every one of its rollouts is stored, and "failure" when one has raised.
        """
        rollout = self.config.actor_rollout_ref.rollout
        partition = partition_of(trajectory["validate"])
        key = prompt["uid"]
        running = asyncio.ensure_future(self.statuses.add(Status(partition, key, "running")))
        sessions = rollout.val_kwargs.n if trajectory["validate"] else rollout.n
        sessions = prompt.pop("__rollout_n__", sessions)
        if not prompt.pop("__do_sample__", True) and not trajectory["validate"]:
            sampling_params = {**sampling_params, "temperature": 0, "top_p": 1.0, "top_k": -1}
        rollouts = [
            self._run_agent_loop(sampling_params, trajectory, trace=trace, session_id=session, **prompt)
            for session in range(sessions)
        ]
        # All of them end before the prompt does: a failed prompt is cleared, and no rollout may be stored after that.
        ended = await asyncio.gather(*rollouts, return_exceptions=True)
        errors = [error for error in ended if isinstance(error, BaseException)]
        for error in errors:
            logger.error("a rollout of prompt %s failed", key, exc_info=error)
        await running
        await self.statuses.add(Status(partition, key, "failure" if errors else "finished"))

    async def _agent_loop_postprocess(self, output: Any, validate: bool, **kwargs: Any) -> None:
        """Reward and store a rollout, or the several outputs of one of several turns."""
        outputs = output if isinstance(output, list) else [output]
        if not any(one.response_ids for one in outputs):
            raise RunError("an empty rollout: the agent loop gave back no token, and there is nothing to train on")
        if get_policy(self.trb.policy).marks_corrections:
            outputs = [MarkedOutput.read(one) for one in outputs]
        # Large, and nothing to the reward worker, which would take a third of a second for 16 rollouts of 64 tokens.
        of_teacher = [
            {name: from_bytes(*one.extra_fields.pop(name)) for name in OF_TEACHER if name in one.extra_fields}
            for one in outputs
        ]
        with self.spans.during("reward"):
            await self._compute_score(outputs, kwargs=kwargs)
        last = outputs[-1]
        for earlier in outputs[:-1]:
            if last.reward_score is not None:
                earlier.reward_score = last.reward_score
                earlier.extra_fields["reward_extra_info"] = last.extra_fields["reward_extra_info"]
        prefix, partition = f"{kwargs['uid']}_{kwargs['session_id']}", partition_of(validate)
        with self.spans.during("store"):
            rows = [
                Row(partition, f"{prefix}_{i}", *self._row(one, kwargs, kept))
                for i, (one, kept) in enumerate(zip(outputs, of_teacher, strict=True))
            ]
            await asyncio.gather(*map(self.rows.add, rows))

    async def _compute_score(self, outputs: list[AgentLoopOutput], kwargs: dict[str, Any]) -> None:
        self.scoring += 1
        try:
            await self._score(outputs, kwargs)
        finally:
            self.scoring -= 1

    async def _score(self, outputs: list[AgentLoopOutput], kwargs: dict[str, Any]) -> None:
        last = outputs[-1]
        whole = len(outputs) == 1 and self.processor is None  # of several turns or with pictures: verl's own way
        if not whole or last.reward_score is not None or not self.reward_loop_worker_handles:
            return await super()._compute_score(outputs, kwargs)
        started = time.perf_counter()
        result = await self.rewards.score(last, kwargs)
        last.reward_score = result["reward_score"]
        last.extra_fields["reward_extra_info"] = result["reward_extra_info"]
        last.metrics.compute_score = time.perf_counter() - started

    def _row(
        self, output: AgentLoopOutput, sample: dict[str, Any], of_teacher: dict[str, torch.Tensor]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """One row of the batch, fields and tag by verl's names. sample: the data set's fields, and the step."""
        input_ids = torch.tensor([*output.prompt_ids, *output.response_ids], dtype=torch.int64)
        pictures = self._compute_multi_modal_inputs(output, input_ids)
        attention_mask = torch.ones_like(input_ids)
        positions = self._compute_position_ids(input_ids.unsqueeze(0), attention_mask.unsqueeze(0), pictures)
        fields = {**output.as_dict(), **sample, **of_teacher}
        fields.pop("multi_modal_data", None)
        fields |= {
            "loss_mask": fields["response_mask"],
            "input_ids": input_ids,
            "position_ids": positions.squeeze(0),
            "multi_modal_inputs": pictures,
        }
        tag = {
            "status": "success",
            "prompt_len": len(output.prompt_ids),
            "response_len": len(output.response_ids),
            "ended": output.response_ids[-1:] == [self.tokenizer.eos_token_id],
            "seq_len": len(input_ids),
            "global_steps": sample["global_steps"],
            "min_global_steps": fields["extra_fields"].get("min_global_steps"),
            "max_global_steps": fields["extra_fields"].get("max_global_steps"),
        }
        return fields, tag


class DistillationAgentLoopManager(AgentLoopManagerTQ):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = DistillationAgentLoopWorker

    def generate_sequences(self, prompts: TensorDict) -> None:
        """Starts a batch's rollouts and returns."""
        workers = self.agent_loop_workers
        batches = map(Prompts.of, prompts.chunk(len(workers)))
        ray.get([worker.generate_sequences.remote(batch) for worker, batch in zip(workers, batches, strict=False)])
