"""verl's vLLM server and replica with the teacher as the engine's model and the student as its draft model.

Registered with verl as the rollout engine `trb` (`actor_rollout_ref.rollout.name: trb`).
"""

import asyncio
import multiprocessing
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import ray
from omegaconf import DictConfig, OmegaConf
from verl.workers.rollout.base import _ROLLOUT_REGISTRY
from verl.workers.rollout.replica import RolloutReplicaRegistry, TokenOutput
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
from vllm import ModelRegistry
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from verl_trb.policies import get_policy
from verl_trb.prefork import EXECUTABLE
from verl_trb.rollout.engine_args import ENGINE_ENVIRONMENT, ONE_BY_ONE, blended_engine_args, model_length
from verl_trb.rollout.generation import Answer, generate_blended
from verl_trb.rollout.request import KEEP, PARAMS, POLICY, ROLLOUT_NAME, SEED, TRACE, BlendedRequest
from verl_trb.rollout.request_groups import Answers, answer_group
from verl_trb.rollout.statistics import merge
from verl_trb.rollout.weight_socket import name_socket
from verl_trb.verified import HIDDEN_STATES, TEACHER_HIDDEN, VERIFIED, byte_rows
from verl_trb.vocabulary import from_tokenizers


def know_models(*configs: Any) -> None:
    """Tells vLLM the classes of these models. It would look at them in a process of its own, for fear of what an import
    does to CUDA: the first start on a machine takes longer for that.
    """
    for name in {name for config in configs for name in config.architectures or ()} & ModelRegistry.models.keys():
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


class BlendedHttpServer(vLLMHttpServer):
    """One engine. `config.custom.trb` carries the resolved `trb` section of the run's config."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        os.environ.update(ENGINE_ENVIRONMENT)
        # vLLM spawns the engine's process, which would import everything. (Some temporary folders allow no programs.)
        if os.access(executable := os.environ.get(EXECUTABLE, ""), os.X_OK):
            multiprocessing.set_executable(executable)
        self.trb: dict[str, Any] = OmegaConf.to_container(OmegaConf.create(config.custom["trb"]))
        self.resubmitted = 0
        # The teacher's gate: closed (skipped) only while no request in flight needs the teacher.
        self.teacher_skipped, self.in_flight = False, 0
        self.teacher_released = False
        self.gate = asyncio.Condition()
        super().__init__(config, *args, **kwargs)
        name_socket()

    def _init_model_config(self, model_config: Any) -> Any:
        """The engine's model is the teacher; the student's own config and tokenizer are kept beside it."""
        self.student = super()._init_model_config(model_config)
        teacher = OmegaConf.create(OmegaConf.to_container(DictConfig(model_config), resolve=True))
        teacher.path = self.trb["teacher"]["path"]
        teacher.hf_config_path = teacher.tokenizer_path = None
        # Only the attention implementation carries over: the student's other overrides are not the teacher's.
        attention = teacher.override_config.get("attn_implementation")
        teacher.override_config = {"attn_implementation": attention} if attention else {}
        resolved = super()._init_model_config(teacher)
        self.vocabulary = from_tokenizers(
            self.student.tokenizer,
            resolved.tokenizer,
            student_rows=self.student.hf_config.vocab_size,
            teacher_rows=resolved.hf_config.vocab_size,
        )
        return resolved

    def _validate_configs(self) -> None:
        super()._validate_configs()
        needed = model_length(self.config.prompt_length, self.config.response_length, self.trb["draft_tokens"])
        if self.config.max_model_len < needed:
            raise ValueError(
                f"actor_rollout_ref.rollout.max_model_len is {self.config.max_model_len}; it must be at least {needed}"
            )

    def _preprocess_engine_kwargs(self, engine_kwargs: dict) -> None:
        super()._preprocess_engine_kwargs(engine_kwargs)
        tensor_parallel = self.config.tensor_model_parallel_size
        rows = self.student.hf_config.vocab_size, self.model_config.hf_config.vocab_size
        ours = blended_engine_args(self.student.local_path, self.trb["draft_tokens"], tensor_parallel, *rows)
        engine_kwargs.update(ours)
        if self.trb["deterministic"]:
            engine_kwargs.update(ONE_BY_ONE)

    def _resolve_sleep_level(self) -> int:
        return 1  # level 2 discards weights, and the teacher's would never come back

    async def run_server(self, args: Any) -> None:
        if current_platform.is_cpu():
            know_models(self.student.hf_config, self.model_config.hf_config)
        await super().run_server(args)
        await self.engine.collective_rpc(
            method="install_behavior_policy",
            kwargs={
                "policy": self.trb["policy"],
                "vocabulary": asdict(self.vocabulary),
                "adapt_drafts": self.trb["adapt_drafts"],
            },
        )

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **kwargs: Any
    ) -> TokenOutput:
        """A rollout of μ after `prompt_ids`: verl's interface, one or more engine requests behind it."""
        params = dict(sampling_params)
        asked_of_us = params.pop("extra_args", None) or {}
        guidance, policy, trace = (asked_of_us.get(name) for name in (PARAMS, POLICY, TRACE))
        keep = None if asked_of_us.get(KEEP) is None else (uuid.uuid4().hex, asked_of_us[KEEP])
        params.pop("logprobs", None)
        room = self.config.prompt_length + self.config.response_length - len(prompt_ids)
        asked = params.pop("max_tokens", params.pop("max_new_tokens", self.config.response_length))
        max_tokens = min(asked, room)
        stop_ids = [self.vocabulary.student_eos]

        async def submit(prefix: list[int], request: BlendedRequest, budget: int, round_: int) -> Answer:
            output = await super(BlendedHttpServer, self).generate(
                prefix,
                {
                    **params,
                    "max_tokens": budget,
                    "logprobs": True,
                    "detokenize": False,
                    "output_kind": RequestOutputKind.FINAL_ONLY,  # nobody reads a rollout before it is whole
                    "stop_token_ids": [*stop_ids, self.vocabulary.marker],
                    "extra_args": replace(request, trace=trace, keep=keep).extra_args(),
                },
                request_id if round_ == 0 else f"{request_id}-{round_}",
                **kwargs,
            )
            return Answer(output.token_ids, output.log_probs or [], output.stop_reason, raw=output)

        marker = self.vocabulary.marker
        needs_teacher = guidance is not None and get_policy(policy or self.trb["policy"]).needs_teacher
        async with self._teacher_gate(needs_teacher):
            seed = asked_of_us.get(SEED)
            rollout = await generate_blended(submit, prompt_ids, max_tokens, guidance, marker, stop_ids, policy, seed)
        self.resubmitted += rollout.resubmitted
        output: TokenOutput = rollout.raw
        output.token_ids, output.log_probs = rollout.token_ids, rollout.logprobs
        output.stop_reason = rollout.stop_reason
        if keep is not None:
            field = TEACHER_HIDDEN if keep[1] == HIDDEN_STATES else VERIFIED
            output.extra_fields[field] = await self._take_kept(keep[0], len(rollout.token_ids))
        return output

    async def _take_kept(self, name: str, tokens: int) -> tuple[str, np.ndarray]:
        """`byte_rows` of the first tensor-parallel rank. Raises RuntimeError if they are not those of the rollout."""
        dtype, rows = byte_rows(*(await self.engine.collective_rpc("take_kept", args=(name,)))[0])
        if len(rows) != tokens:
            raise RuntimeError(f"the rollout engine kept what it verified of {len(rows)} of {tokens} tokens")
        return dtype, rows

    async def generate_group(self, requests: list[dict[str, Any]]) -> AsyncIterator[Answers]:
        """`generate` for many requests, by keyword: see request_groups.py."""
        async for answers in answer_group(self.generate, requests):
            yield answers

    @asynccontextmanager
    async def _teacher_gate(self, needed: bool) -> AsyncIterator[None]:
        """Hold a place in the engine while the gate is as this request needs it.

        A request that does not need the teacher goes either way, and closes the gate when it finds the engine
        empty. Blocks cached while the teacher was skipped lack its keys and values: they are dropped.
        """
        async with self.gate:
            if needed and self.teacher_released:
                raise RuntimeError(
                    "a rollout needs the teacher, whose memory trb.release_teacher has freed in the rollout engine: "
                    "start the run with trb.release_teacher=false"
                )
            if needed and self.teacher_skipped:
                await self.gate.wait_for(lambda: self.in_flight == 0 or not self.teacher_skipped)
            skip = not needed and (self.teacher_skipped or self.in_flight == 0)
            await self._skip_teacher(skip)
            self.in_flight += 1
        try:
            yield
        finally:
            async with self.gate:
                self.in_flight -= 1
                self.gate.notify_all()

    async def sample_rollouts(
        self,
        prompts: list[list[int]],
        behaviors: list[tuple[str, dict[str, float] | None]],
        temperature: float,
        max_tokens: int,
    ) -> list[dict[str, Any]]:
        """A traced rollout of every prompt by every behavior, a policy's name and parameters (None: the student).

        Returns for each its `prompt` (number), `policy`, `finished`, and the columns of trace.py. The engine's random
        numbers are left as they were; its statistics are not.
        """
        await self.engine.collective_rpc("begin_traces")
        made: list[dict[str, Any]] = []
        for policy, params in behaviors:  # one after the other: a batch has one policy
            names = [f"sample-{uuid.uuid4().hex}" for _ in prompts]
            asked = {"temperature": temperature, "top_p": 1.0, "top_k": -1, "max_tokens": max_tokens}
            extra = {PARAMS: params, POLICY: None if params is None else policy}
            outputs = await asyncio.gather(
                *(
                    self.generate(prompt, {**asked, "extra_args": {**extra, TRACE: name}}, name)
                    for prompt, name in zip(prompts, names, strict=True)
                )
            )
            for number, (name, output) in enumerate(zip(names, outputs, strict=True)):
                finished = output.token_ids[-1:] == [self.vocabulary.student_eos]
                made.append({"prompt": number, "policy": policy, "finished": finished, "name": name})
        # Every tensor-parallel rank sees the same tokens.
        traces = (await self.engine.collective_rpc("take_traces"))[0]
        return [{**sample, **traces[sample.pop("name")]} for sample in made]

    async def _skip_teacher(self, skip: bool) -> None:
        """Close or open the gate, if the engine is empty."""
        if skip != self.teacher_skipped and self.in_flight == 0:
            if not await self.engine.reset_prefix_cache():
                raise RuntimeError("the rollout engine could not drop its prefix cache although it was idle")
            await self.engine.collective_rpc(method="skip_teacher", kwargs={"skipped": skip})
            self.teacher_skipped = skip

    async def engine_ended(self) -> None:
        """Returns when the engine's process is gone, which a weight sync under way would not notice."""
        while self.node_rank != 0 or not self.engine.errored:
            await asyncio.sleep(1.0)

    async def release_teacher(self) -> None:
        """Free the memory of the teacher's weights and KV cache; from now on requests that need it are refused."""
        if self.node_rank != 0 or self.teacher_released:
            return
        async with self.gate:
            self.teacher_released = True
            await self.gate.wait_for(lambda: self.in_flight == 0)
            await self._skip_teacher(True)
            await self.engine.collective_rpc(method="release_teacher")

    async def take_rollout_statistics(self) -> dict[str, float]:
        """Sums over the rollout tokens since the last call (see statistics.py), and requests resubmitted."""
        if self.node_rank != 0:
            return {}
        # Every tensor-parallel rank sees the same tokens: the first one's sums are the engine's.
        sums = (await self.engine.collective_rpc("take_rollout_statistics"))[0]
        resubmitted, self.resubmitted = self.resubmitted, 0
        return {**sums, "resubmitted": float(resubmitted)}


class BlendedReplica(vLLMReplica):
    """verl's replica of one engine, running our server."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(BlendedHttpServer)

    def _get_server_name_prefix(self) -> str:
        return f"{ROLLOUT_NAME}_"

    async def sleep(self) -> None:
        if self.config.free_cache_engine:  # else the servers would be asked twice, for nothing
            await super().sleep()

    async def take_rollout_statistics(self) -> dict[str, float]:
        return merge([await server.take_rollout_statistics.remote() for server in self.servers])


def register_rollout() -> None:
    """Make `actor_rollout_ref.rollout.name=trb` known to verl in this process."""
    RolloutReplicaRegistry.register(ROLLOUT_NAME, lambda: BlendedReplica)
    # verl keeps the worker-side adapters in a plain dict.
    _ROLLOUT_REGISTRY[(ROLLOUT_NAME, "async")] = "verl_trb.rollout.weight_socket.RolloutAdapter"


register_rollout()
