"""Calls that wait for one another go out together, in order, and an error reaches the items it belongs to."""

import asyncio

import pytest

from verl_trb.training.group_commit import GroupCommit


class Calls:
    """Remembers what each call carried; a call lasts until `release` is set."""

    def __init__(self) -> None:
        self.carried: list[list[int]] = []
        self.release = asyncio.Event()
        self.at_once = self.most_at_once = 0

    async def __call__(self, items: list[int]) -> None:
        self.carried.append(items)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await self.release.wait()
        self.at_once -= 1
        if 13 in items:
            raise ValueError("13")


def test_what_comes_during_a_call_leaves_together_in_order():
    async def run():
        calls = Calls()
        group = GroupCommit(calls)
        tasks = [asyncio.create_task(group.add(1))]
        await asyncio.sleep(0.01)
        assert calls.carried == [[1]]  # at once
        tasks += [asyncio.create_task(group.add(item)) for item in (2, 3, 4)]
        await asyncio.sleep(0.01)
        assert calls.carried == [[1]] and not any(task.done() for task in tasks)
        calls.release.set()
        await asyncio.gather(*tasks)
        assert calls.carried == [[1], [2, 3, 4]] and calls.most_at_once == 1
        await group.add(5)  # and it starts anew
        assert calls.carried[-1] == [5]

    asyncio.run(run())


def test_an_error_is_raised_for_the_items_of_its_call_only():
    async def run():
        calls = Calls()
        calls.release.set()
        group = GroupCommit(calls)
        first = asyncio.create_task(group.add(1))
        await asyncio.sleep(0)
        results = await asyncio.gather(group.add(13), group.add(2), return_exceptions=True)
        assert await first is None
        assert all(isinstance(result, ValueError) for result in results) or calls.carried[0] == [1, 13, 2]
        with pytest.raises(ValueError, match="13"):
            await group.add(13)
        await group.add(7)  # the next call is not affected
        assert calls.carried[-1] == [7]

    asyncio.run(run())


def test_a_cancelled_item_does_not_disturb_the_others():
    async def run():
        calls = Calls()
        group = GroupCommit(calls)
        first, second = asyncio.create_task(group.add(1)), asyncio.create_task(group.add(2))
        await asyncio.sleep(0.01)
        first.cancel()
        calls.release.set()
        await second

    asyncio.run(run())
