"""Rollouts scored in groups get the rewards they would get alone, from verl's own reward manager."""

import asyncio
from typing import Any

import pytest
from omegaconf import OmegaConf
from verl.experimental.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics
from verl.experimental.reward_loop.reward_loop import RewardLoopWorker
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager

from verl_trb.tasks import table_walk
from verl_trb.tasks.toy_models import make_tokenizer
from verl_trb.training.reward_groups import RewardGroups, Unscored, group_batch

ROLLOUTS = [("5A=", "A6."), ("123456=", "B"), ("7AB=", "A1B2C3."), ("0=", "H")]


def rollout(tokenizer: Any, prompt: str, response: str) -> Unscored:
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in (prompt, response)]
    output = AgentLoopOutput(
        prompt_ids=ids[0], response_ids=ids[1], response_mask=[1] * len(ids[1]), num_turns=2, metrics=AgentLoopMetrics()
    )
    sample = {
        "data_source": prompt,
        "reward_model": {"ground_truth": response},
        "extra_info": {"index": len(prompt)},
        "raw_prompt": [{"role": "user", "content": prompt}],
    }
    return Unscored(output, sample)


def score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]) -> dict[str, Any]:
    """What it was given, in a form that shows any mixing up."""
    if data_source == "7AB=":
        raise ValueError("no reward for 7")
    return {
        "score": extra_info["index"],
        "acc": 1.0,
        "said": solution_str,
        "truth": ground_truth,
        "source": data_source,
    }


class InProcess:
    """verl's reward worker without Ray around it, counting calls."""

    def __init__(self, tokenizer: Any) -> None:
        self.worker = RewardLoopWorker.__new__(RewardLoopWorker)  # its set-up reads a whole configuration
        reward = {"custom_reward_function": {"path": "here"}}
        self.worker.config = OmegaConf.create({"reward": reward})
        self.worker.reward_manager = NaiveRewardManager(self.worker.config, tokenizer, score)
        self.sizes: list[int] = []
        self.compute_score_batch = self

    async def remote(self, data: Any) -> list[dict[str, Any]]:
        self.sizes.append(len(data))
        return await self.worker.compute_score_batch(data)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(table_walk)


async def scores(tokenizer: Any, which: list[tuple[str, str]]) -> tuple[list[Any], list[int]]:
    worker = InProcess(tokenizer)
    groups = RewardGroups([worker])
    items = [rollout(tokenizer, *one) for one in which]
    results = await asyncio.gather(*[groups.score(*item) for item in items], return_exceptions=True)
    return results, worker.sizes


def test_a_group_is_one_call_with_each_rollouts_own_reward(tokenizer):
    good = [one for one in ROLLOUTS if one[0] != "7AB="]

    async def both():
        together, sizes = await scores(tokenizer, good)
        alone = [(await scores(tokenizer, [one]))[0][0] for one in good]
        return together, sizes, alone

    together, sizes, alone = asyncio.run(both())
    assert sizes == [len(good)]
    assert together == alone
    for (prompt, response), result in zip(good, together, strict=True):
        extra = result["reward_extra_info"]
        said = tokenizer.decode(tokenizer.encode(response, add_special_tokens=False), skip_special_tokens=True)
        assert (extra["source"], extra["said"], result["reward_score"]) == (prompt, said, len(prompt))


def test_an_error_stays_with_its_rollout(tokenizer):
    results, sizes = asyncio.run(scores(tokenizer, ROLLOUTS))
    assert sizes == [4, 1, 1, 1, 1]
    assert [isinstance(result, ValueError) for result in results] == [prompt == "7AB=" for prompt, _ in ROLLOUTS]


def test_padding_is_left_of_prompts_and_right_of_responses(tokenizer):
    batch = group_batch([rollout(tokenizer, *one) for one in ROLLOUTS]).batch
    assert batch["prompts"].shape == (4, 7) and batch["responses"].shape == (4, 7)
    assert batch["attention_mask"][0].tolist() == [0] * 4 + [1] * 6 + [0] * 4
    assert batch["position_ids"][0, 4:10].tolist() == list(range(6))
