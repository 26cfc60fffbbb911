"""Rewards asked for in groups: rollouts that end within a moment of one another go to verl's reward worker together.

A call ships a batch of tensors and the prompts' fields, which takes both sides several milliseconds whatever the batch
holds. The worker scores the rollouts of a batch side by side, as it does several calls.
"""

import asyncio
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDict
from verl import DataProto
from verl.experimental.agent_loop import AgentLoopOutput

MOMENT = 0.003  # seconds


class Unscored(NamedTuple):
    """A rollout, and the data set's fields of its prompt."""

    output: AgentLoopOutput
    sample: dict[str, Any]


class RewardGroups:
    """`workers`: handles of verl's `RewardLoopWorker`."""

    def __init__(self, workers: Sequence[Any]) -> None:
        self.workers = workers
        self.waiting: list[tuple[Unscored, asyncio.Future[dict[str, Any]]]] = []
        self.sending: set[asyncio.Task[None]] = set()

    async def score(self, output: AgentLoopOutput, sample: dict[str, Any]) -> dict[str, Any]:
        """verl's `reward_score` and `reward_extra_info` of one rollout; raises what its reward function raised."""
        scored = asyncio.get_running_loop().create_future()
        self.waiting.append((Unscored(output, sample), scored))
        if len(self.waiting) == 1:
            task = asyncio.create_task(self._send())
            self.sending.add(task)
            task.add_done_callback(self.sending.discard)
        return await scored

    async def _send(self) -> None:
        await asyncio.sleep(MOMENT)
        group, self.waiting = self.waiting, []
        results = await self._results([item for item, _ in group])
        for result, (_, scored) in zip(results, group, strict=True):
            if scored.done():  # its rollout was cancelled
                continue
            if isinstance(result, BaseException):
                scored.set_exception(result)
            else:
                scored.set_result(result)

    async def _results(self, group: list[Unscored]) -> list[Any]:
        try:
            return await random.choice(self.workers).compute_score_batch.remote(group_batch(group))
        except Exception as error:
            if len(group) == 1:
                return [error]
        # The worker says only that one of them failed: ask for each alone, so that the error stays with its rollout.
        alone = await asyncio.gather(*[self._results([item]) for item in group])
        return [result for results in alone for result in results]


def group_batch(group: Sequence[Unscored]) -> DataProto:
    """The batch that verl's reward managers read: prompts padded on the left, responses on the right."""
    prompts, responses = [item.output.prompt_ids for item in group], [item.output.response_ids for item in group]
    prompt_BP, response_BR = _padded(prompts, left=True), _padded(responses)
    prompt_mask_BP = _padded([[1] * len(prompt) for prompt in prompts], left=True)
    mask_BT = torch.cat([prompt_mask_BP, _padded([[1] * len(response) for response in responses])], 1)
    tensors = {
        "prompts": prompt_BP,
        "responses": response_BR,
        "input_ids": torch.cat([prompt_BP, response_BR], 1),
        "attention_mask": mask_BT,
        "position_ids": (mask_BT.cumsum(1) - 1).clamp(min=0),
    }
    fields = {name: [item.sample[name] for item in group] for name in group[0].sample}
    fields["__num_turns__"] = [item.output.num_turns for item in group]
    fields["tool_extra_fields"] = [item.output.extra_fields for item in group]
    fields["prompt_len"] = [len(prompt) for prompt in prompts]
    fields["response_len"] = [len(response) for response in responses]
    columns = {name: np.fromiter(values, dtype=object, count=len(group)) for name, values in fields.items()}
    return DataProto(batch=TensorDict(tensors, batch_size=len(group)), non_tensor_batch=columns)


def _padded(rows: Sequence[Sequence[int]], left: bool = False) -> torch.Tensor:
    """int64 [rows, longest], padded with 0."""
    width = max(map(len, rows))
    return torch.tensor(
        [[0] * (width - len(row)) + [*row] if left else [*row] + [0] * (width - len(row)) for row in rows]
    )
