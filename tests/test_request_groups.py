"""Requests in groups, through a real Ray actor: every answer and every error reaches its own request."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import ray

from verl_trb.rollout.request_groups import Answers, GroupingServer, answer_group


class Server:
    def __init__(self) -> None:
        self.groups: list[int] = []

    async def generate(self, value: int, seconds: float) -> int:
        await asyncio.sleep(seconds)
        if value == 13:
            raise ValueError("unlucky")
        return value * value

    async def generate_group(self, requests: list[dict[str, Any]]) -> AsyncIterator[Answers]:
        self.groups.append(len(requests))
        async for answers in answer_group(self.generate, requests):
            yield answers

    async def sizes(self) -> list[int]:
        return self.groups


def test_answers_come_as_they_end_and_errors_alone():
    """Whose turn it is decides which requests end together, not the clock."""

    async def run() -> list[Answers]:
        turns = [asyncio.Event() for _ in range(3)]

        async def generate(value: int, turn: int) -> int:
            await turns[turn].wait()
            if value == 13:
                raise ValueError("unlucky")
            return value * value

        requests = [{"value": value, "turn": turn} for value, turn in ((13, 2), (3, 1), (0, 0), (3, 1))]
        turns[0].set()
        rounds: list[Answers] = []
        async for answers in answer_group(generate, requests):
            rounds.append(answers)
            if len(rounds) < len(turns):
                turns[len(rounds)].set()
        return rounds

    rounds = asyncio.run(run())
    assert rounds[0] == [(2, 0)] and dict(rounds[1]) == {1: 9, 3: 9}
    [(place, error)] = rounds[2]
    assert place == 0 and isinstance(error, ValueError)


@pytest.fixture(scope="module")
def server():
    if ray.is_initialized():
        pytest.skip("another test's Ray is up in this process")
    here = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}  # the actor's class is in this file
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env=here)
    yield ray.remote(Server).options(max_concurrency=100).remote()
    ray.shutdown()


def test_through_ray(server):
    async def run():
        grouped = GroupingServer(server)

        async def ask(value: int, seconds: float = 0.0) -> int:
            return await grouped.generate.remote(value=value, seconds=seconds)

        results = await asyncio.gather(*[ask(v, (20 - v) / 200) for v in range(20)], return_exceptions=True)
        late = await ask(100)
        return results, late, await server.sizes.remote()

    results, late, sizes = asyncio.run(run())
    assert [r for r in results if not isinstance(r, Exception)] == [v * v for v in range(20) if v != 13]
    assert isinstance(results[13], ValueError) and late == 10_000
    assert sizes == [20, 1]


def test_a_dead_server_leaves_nobody_waiting(server):
    async def run():
        grouped = GroupingServer(server)
        asked = asyncio.gather(
            *[grouped.generate.remote(value=v, seconds=60.0) for v in range(3)], return_exceptions=True
        )
        await asyncio.sleep(0.5)
        ray.kill(server)
        return await asyncio.wait_for(asked, 30)

    assert all(isinstance(result, ray.exceptions.RayActorError) for result in asyncio.run(run()))
