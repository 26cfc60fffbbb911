"""What a rollout costs the agent loop's process around the engine: ours against verl's, CPU milliseconds a batch.

    python scripts/bench_calls.py        # half a minute, of which most is imports; one thread, no other process

Two parts of a step, for 48 prompts with the quickstart's fields: starting the prompts of a batch, from the trainer's
tensordict to the first line of each rollout; and storing finished rollouts, rows to columns and what TransferQueue's
client does with them up to the bytes it sends. Both sides in turns; prints medians and ratios.
"""

from __future__ import annotations

import asyncio
import pickle
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from transfer_queue.metadata import extract_field_schema
from transfer_queue.storage.managers.simple_storage_manager import AsyncSimpleStorageManager
from transfer_queue.utils.serial_utils import encode
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ
from verl.utils import tensordict_utils as tu
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from verl_trb.training.agent_loop import DistillationAgentLoopWorker, Prompts
from verl_trb.training.columns import Columns

PROMPTS, PROMPT, RESPONSE, REPEATS = 48, 12, 24, 9


def sample(i: int) -> dict[str, Any]:
    """The data set's fields of a prompt."""
    return {
        "raw_prompt": [{"role": "user", "content": "0ACBGGCBAFHFG="}],
        "data_source": "table_walk",
        "ability": "toy",
        "reward_model": {"style": "rule", "ground_truth": "ABCDEFGH"},
        "extra_info": {"index": i, "split": "train"},
        "index": i,
        "tools_kwargs": {},
        "interaction_kwargs": {},
        "uid": f"prompt-{i}",
    }


def row(i: int) -> dict[str, Any]:
    """The fields of a rollout."""
    long, short = torch.arange(PROMPT + RESPONSE), torch.arange(RESPONSE - i % 8)
    fields = {"prompts": torch.arange(PROMPT), "input_ids": long, "position_ids": long}
    fields |= {name: short for name in ("responses", "response_mask", "loss_mask")}
    fields |= {name: short.float() for name in ("rollout_log_probs", "rm_scores")}
    more = {"global_steps": 3, "turn_scores": [], "tool_rewards": [], "reward_extra_info": {"acc": 1.0}}
    return {**fields, **sample(i), "extra_fields": more, "num_turns": 2, "multi_modal_inputs": {}, "session_id": 0}


def store(columns_of: Callable[[list[dict[str, Any]]], Any]) -> Callable[[], None]:
    rows, positions = [row(i) for i in range(PROMPTS)], list(range(PROMPTS))

    def run() -> None:
        columns = columns_of(rows)
        extract_field_schema(columns)
        select = AsyncSimpleStorageManager._select_by_positions
        encode({name: select(columns[name], positions) for name in columns.keys()})  # noqa: SIM118

    return run


def start(actor: Any) -> Callable[[], None]:
    class Starting(actor.__ray_metadata__.modified_class):
        async def _run_prompt(self, *args: Any, **kwargs: Any) -> None:
            return None

    samples = [sample(i) for i in range(PROMPTS)]
    batch = tu.get_tensordict({name: np.array([each[name] for each in samples], dtype=object) for name in samples[0]})
    tu.assign_non_tensor_data(batch, "global_steps", 3)
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": -1}
    rollout = {**sampling, "calculate_log_probs": True, "agent": {"default_agent_loop": "single_turn_agent"}}
    worker = Starting.__new__(Starting)
    worker.background_tasks = set()
    worker.config = OmegaConf.create({"actor_rollout_ref": {"rollout": {**rollout, "val_kwargs": sampling}}})

    async def once() -> None:
        sent = batch if actor is AgentLoopWorkerTQ else Prompts.of(batch)
        await worker.generate_sequences(pickle.loads(pickle.dumps(sent)))
        await asyncio.gather(*worker.background_tasks)

    return lambda: asyncio.run(once())


def main() -> None:
    torch.set_num_threads(1)
    parts = {
        "start": {"verl": start(AgentLoopWorkerTQ), "ours": start(DistillationAgentLoopWorker)},
        "store": {"verl": store(list_of_dict_to_tensordict), "ours": store(Columns)},
    }
    print(f"{PROMPTS} prompts, CPU milliseconds\n       verl   ours  ratio")
    for part, sides in parts.items():
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for repeat in range(REPEATS + 1):  # the first warms up
            for name, side in sides.items():
                began = time.thread_time()
                side()
                if repeat:
                    seconds[name].append(time.thread_time() - began)
        verl, ours = (1e3 * statistics.median(seconds[name]) for name in ("verl", "ours"))
        print(f"{part}  {verl:5.1f}  {ours:5.1f}  {verl / ours:4.1f}x")


if __name__ == "__main__":
    main()
