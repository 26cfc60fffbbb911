"""What our agent loop worker stores in TransferQueue is, field by field, what verl's own stores."""

import asyncio
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transfer_queue
from omegaconf import OmegaConf
from tensordict import TensorDict
from transfer_queue.metadata import extract_field_schema
from transfer_queue.storage.managers.simple_storage_manager import AsyncSimpleStorageManager
from transfer_queue.storage.simple_storage import StorageUnitData
from transfer_queue.utils.serial_utils import decode, encode
from verl.experimental.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ
from verl.utils import tensordict_utils as tu
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from verl_trb.training.agent_loop import DistillationAgentLoopWorker, Prompts, put_rows, put_statuses
from verl_trb.training.columns import Columns
from verl_trb.training.group_commit import GroupCommit

Ours: Any = DistillationAgentLoopWorker.__ray_metadata__.modified_class
Verls: Any = AgentLoopWorkerTQ.__ray_metadata__.modified_class


class Puts:
    """Stands for TransferQueue's put: what was asked for, by key."""

    def __init__(self) -> None:
        self.calls = 0
        self.rows: dict[str, tuple[str, dict[str, Any] | None, dict[str, Any]]] = {}
        self.statuses: list[tuple[str, str]] = []

    async def batch(self, keys: list[str], partition_id: str, fields: TensorDict | None = None, tags: Any = None):
        self.calls += 1
        for i, key in enumerate(keys):
            if fields is None:
                self.statuses.append((key, tags[i]["status"]))
            else:
                self.rows[key] = (partition_id, {name: fields[name][i] for name in fields.keys()}, tags[i])  # noqa: SIM118

    async def one(self, key: str, partition_id: str, tag: dict[str, Any]) -> None:
        await self.batch([key], partition_id, None, [tag])


def output(ids: list[int], logprobs: list[float]) -> AgentLoopOutput:
    return AgentLoopOutput(
        prompt_ids=[5, 6, 7],
        response_ids=ids,
        response_mask=[1] * len(ids),
        response_logprobs=logprobs,
        reward_score=0.5,
        num_turns=2,
        metrics=AgentLoopMetrics(),
        multi_modal_data={},
        extra_fields={"min_global_steps": 3, "max_global_steps": 3, "reward_extra_info": {"acc": 0.5}},
    )


def worker(kind: Any, rollouts: list[Any]) -> Any:
    """A worker without its set-up, whose agent loop answers with `rollouts` in turn, errors included."""

    class Answering(kind):
        async def _run_agent_loop(self, sampling_params, trajectory, *, session_id, trace=True, **kwargs):
            rollout = rollouts[session_id]
            if isinstance(rollout, Exception):
                raise rollout
            await self._agent_loop_postprocess(rollout, trajectory["validate"], session_id=session_id, **kwargs)

    made = Answering.__new__(Answering)
    made.config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"n": len(rollouts), "val_kwargs": {"n": 1}}}})
    made.processor, made.distillation_enabled, made.reward_loop_worker_handles = None, False, None
    if kind is Ours:
        from verl_trb.timeline import Spans

        made.spans, made.scoring = Spans("rollouts"), 0
        made.trb, made.tokenizer = SimpleNamespace(policy="trb"), SimpleNamespace(eos_token_id=9)
        made.statuses, made.rows = GroupCommit(put_statuses), GroupCommit(put_rows)
    return made


def stored(kind: Any, rollouts: list[Any], monkeypatch: pytest.MonkeyPatch) -> Puts:
    puts = Puts()
    monkeypatch.setattr(transfer_queue, "async_kv_batch_put", puts.batch)
    monkeypatch.setattr(transfer_queue, "async_kv_put", puts.one)
    sample = {"uid": "abc", "global_steps": 4, "data_source": "toy", "raw_prompt": [{"role": "user", "content": "x"}]}
    trajectory = {"step": 4, "sample_index": 0, "rollout_n": 0, "validate": False}
    asyncio.run(worker(kind, rollouts)._run_prompt(dict(sample), {"temperature": 1.0}, trajectory))
    return puts


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("validate", [False, True])
def test_prompts_start_as_verls(validate):
    prompts = {
        "raw_prompt": np.array([[{"role": "user", "content": text}] for text in "abc"] + [None], dtype=object)[:3],
        "index": np.array([4, 4, 7], dtype=object),
        "uid": np.array(["x", "y", "z"], dtype=object),
        "reward_model": np.array([{"ground_truth": n} for n in range(3)], dtype=object),
        "weight": torch.tensor([1.0, 2.0, 3.0]),
    }
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": -1}
    rollout = {**sampling, "calculate_log_probs": True, "agent": {"default_agent_loop": "single_turn_agent"}}
    rollout["val_kwargs"] = {**sampling, "temperature": 0.5}

    def started(kind: Any) -> list[Any]:
        calls = []

        class Starting(kind):
            async def _run_prompt(self, prompt, sampling_params, trajectory, trace=False):
                calls.append((prompt, sampling_params, trajectory, trace))

        batch = tu.get_tensordict(dict(prompts))
        tu.assign_non_tensor_data(batch, "global_steps", 5)
        if validate:
            tu.assign_non_tensor_data(batch, "validate", True)
        made = Starting.__new__(Starting)
        made.config, made.background_tasks = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}}), set()

        async def run() -> None:
            sent = Prompts.of(batch) if kind is Ours else batch
            await made.generate_sequences(pickle.loads(pickle.dumps(sent)))
            await asyncio.gather(*made.background_tasks)

        asyncio.run(run())
        return calls

    ours, verls = started(Ours), started(Verls)
    assert len(ours) == len(verls) == 3
    for one, other in zip(ours, verls, strict=True):
        assert one[1:] == other[1:]
        assert one[0].keys() == other[0].keys()
        assert all(same(one[0][name], value) for name, value in other[0].items())


def test_transfer_queue_stores_columns_as_it_stores_a_tensordict():
    """Through its own selection, encoding and storage."""
    rows = [
        {"ids": torch.arange(i + 1), "mask": torch.ones(2), "info": {"n": i}, "text": f"row {i}", "step": i, "none": {}}
        for i in range(3)
    ]

    def through(columns: Any) -> dict[str, list[Any]]:
        positions = list(range(len(rows)))
        sent = {name: AsyncSimpleStorageManager._select_by_positions(columns[name], positions) for name in rows[0]}
        storage = StorageUnitData(10)
        storage.put_data(decode(encode(sent)), positions)
        return storage.get_data(list(rows[0]), positions)

    tensordict, columns = list_of_dict_to_tensordict(rows), Columns(rows)
    assert columns.batch_size == tensordict.batch_size
    assert extract_field_schema(columns) == extract_field_schema(tensordict)
    ours, verls = through(columns), through(tensordict)
    assert ours.keys() == verls.keys()
    for name, values in verls.items():
        assert all(same(one, other) for one, other in zip(ours[name], values, strict=True)), name


def test_rows_and_tags_are_verls(monkeypatch):
    rollouts = [output([8, 9], [-0.1, -0.2]), output([4], [-1.5]), [output([1, 2, 3], [-1.0] * 3), output([2], [-0.5])]]
    ours, verls = stored(Ours, rollouts, monkeypatch), stored(Verls, rollouts, monkeypatch)
    assert ours.rows.keys() == verls.rows.keys() == {"abc_0_0", "abc_1_0", "abc_2_0", "abc_2_1"}
    for key, (partition, fields, tag) in verls.rows.items():
        assert (ours.rows[key][0], ours.rows[key][2]) == (partition, tag | {"ended": key == "abc_0_0"})
        assert ours.rows[key][1].keys() == fields.keys()
        assert all(same(ours.rows[key][1][name], value) for name, value in fields.items())
    assert ours.statuses == verls.statuses == [("abc", "running"), ("abc", "finished")]
    assert ours.calls < verls.calls


def test_a_failed_rollout_fails_its_prompt_after_the_others_are_stored(monkeypatch):
    rollouts = [output([8], [-0.1]), ValueError("no"), output([9], [-0.2])]
    ours, verls = stored(Ours, rollouts, monkeypatch), stored(Verls, rollouts, monkeypatch)
    assert ours.rows.keys() == verls.rows.keys() == {"abc_0_0", "abc_2_0"}
    assert ours.statuses == verls.statuses == [("abc", "running"), ("abc", "failure")]
