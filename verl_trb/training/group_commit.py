"""Calls that wait for one another go out together, as a database commits.

A call to another process costs about the same whatever it carries. The first item leaves at once; those that come
while it is under way leave together when it has returned. So nothing waits for company, and a busy receiver gets few
large calls instead of many small ones.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class GroupCommit(Generic[Item]):
    """`commit` is awaited with all items that wait, in the order they came; never twice at one time."""

    def __init__(self, commit: Callable[[list[Item]], Awaitable[None]]) -> None:
        self.commit = commit
        self.waiting: list[tuple[Item, asyncio.Future[None]]] = []
        self.running: asyncio.Task[None] | None = None

    async def add(self, item: Item) -> None:
        """Returns when the call that carried `item` has; raises what that call raised, for each of its items."""
        done = asyncio.get_running_loop().create_future()
        self.waiting.append((item, done))
        if self.running is None:
            self.running = asyncio.create_task(self._run())
        await done

    async def _run(self) -> None:
        while self.waiting:
            taken, self.waiting = self.waiting, []
            error: Exception | None = None
            try:
                await self.commit([item for item, _ in taken])
            except Exception as raised:
                error = raised
            for _, done in taken:
                if done.done():  # its rollout was cancelled
                    continue
                if error is None:
                    done.set_result(None)
                else:
                    done.set_exception(error)
        self.running = None
