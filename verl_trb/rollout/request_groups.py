"""Requests to a rollout server in groups: one call for all that start together, one answer for all that end together.

A call to a server, an actor on a busy event loop, takes caller and server about a millisecond each, and so does its
answer. With one call a rollout the last rollouts of a step start when the first are half done.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

MOMENT = 0.002  # seconds within which requests count as starting together
Answers = list[tuple[int, Any]]  # position in the group, and what the request returned or raised


class GroupingServer:
    """A server's handle as verl's client uses it: `generate.remote(**request)` is awaited for the answer."""

    def __init__(self, handle: Any) -> None:
        """handle: of an actor with a method `generate_group` like `answer_group`."""
        self.handle = handle
        self.generate = self
        self.waiting: list[tuple[dict[str, Any], asyncio.Future[Any]]] = []
        self.sending: set[asyncio.Task[None]] = set()

    def remote(self, **request: Any) -> asyncio.Future[Any]:
        answer = asyncio.get_running_loop().create_future()
        self.waiting.append((request, answer))
        if len(self.waiting) == 1:
            task = asyncio.create_task(self._send())
            self.sending.add(task)
            task.add_done_callback(self.sending.discard)
        return answer

    async def _send(self) -> None:
        await asyncio.sleep(MOMENT)
        group, self.waiting = self.waiting, []
        try:
            async for answers in self.handle.generate_group.remote([request for request, _ in group]):
                for place, result in await answers:
                    _settle(group[place][1], result)
        except Exception as error:  # the server died, or the call itself failed: nobody may wait for ever
            for _, answer in group:
                _settle(answer, error)


def _settle(answer: asyncio.Future[Any], result: Any) -> None:
    if answer.done():
        return
    if isinstance(result, BaseException):
        answer.set_exception(result)
    else:
        answer.set_result(result)


async def answer_group(
    generate: Callable[..., Awaitable[Any]], requests: Sequence[dict[str, Any]]
) -> AsyncIterator[Answers]:
    """All answers of `generate(**request)`, those that are there together in one list; errors are answers too."""
    places = {asyncio.ensure_future(generate(**request)): place for place, request in enumerate(requests)}
    pending = set(places)
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        yield [(places[one], one.exception() or one.result()) for one in done]
