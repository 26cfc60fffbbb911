"""Rewards are found in processes of their own, with limits on time and memory: no string can hang or kill a run.

`ask(judge, request, limits)` may be called from any thread (verl calls reward functions from a thread pool, where
math-verify's own time limits, made of signals, do not work).
"""

import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
from functools import cache
from typing import Any, NamedTuple

# The keeper finds modules where this process does.
START = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from verl_trb.rewards.keeper import main
main(*sys.argv[2:])
"""
START_SECONDS = 120.0  # for imports, on a busy machine
SPARE_SECONDS = 10.0  # for the keeper to notice a time limit and say so


class Limits(NamedTuple):
    """What one answer may use, and how many answers are judged at a time in this process."""

    seconds: float = 5.0
    memory_mb: int = 1024
    workers: int = 2


class Outcome(NamedTuple):
    """What a judge returned; or how it failed: "time limit", "died" (out of memory, or crashed), "raised" and what."""

    verdict: Any = None
    failed: str = ""
    error: str = ""


class KeeperDied(RuntimeError):
    """A keeper ended or did not answer."""


class Keeper:
    """The other end of keeper.py: a subprocess that outlives the answers it is asked about."""

    def __init__(self, judge: tuple[str, ...], memory_mb: int):
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, json.dumps(sys.path), str(memory_mb), *judge],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is the run's business
        )
        try:
            answer = self._read(START_SECONDS)
        except KeeperDied:
            answer = {"error": "its error is printed above"}
        if answer != "ready":
            self.close()
            raise KeeperDied(f"The process that judges ({' '.join(judge)}) did not start: {answer['error']}.")

    def ask(self, request: dict[str, Any], seconds: float) -> Outcome:
        """Raises KeeperDied when the keeper itself fails."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({**request, "seconds": seconds}).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise KeeperDied(str(error)) from None
        return Outcome(**self._read(seconds + SPARE_SECONDS))

    def _read(self, seconds: float) -> Any:
        stdout = self.process.stdout
        assert stdout is not None
        # One line answers one request, so nothing waits in Python's buffer when select looks at the pipe.
        poller = select.poll()
        poller.register(stdout, select.POLLIN)
        line = stdout.readline() if poller.poll(seconds * 1000) else b""
        if not line:
            raise KeeperDied("no answer")
        return json.loads(line)

    def close(self) -> None:
        """Ends the keeper and its judge."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # what was still to be written
                    pass


class Pool:
    """Keepers of one judge, started when they are needed."""

    def __init__(self, judge: tuple[str, ...], memory_mb: int, workers: int):
        self.judge, self.memory_mb = judge, memory_mb
        # The last one used first: a second keeper starts only when two answers come at a time.
        self.free: queue.LifoQueue[Keeper | None] = queue.LifoQueue()
        for _ in range(workers):
            self.free.put(None)

    def ask(self, request: dict[str, Any], seconds: float) -> Outcome:
        keeper = self.free.get()
        try:
            if keeper is None:
                keeper = Keeper(self.judge, self.memory_mb)
            return keeper.ask(request, seconds)
        except KeeperDied:
            if keeper is None:  # it cannot start: every other answer would fail too
                raise
            keeper.close()
            keeper = None
            return Outcome(failed="died")
        finally:
            self.free.put(keeper)

    def close(self) -> None:
        """Ends the keepers that nobody is using."""
        for _ in range(self.free.qsize()):
            keeper = self.free.get()
            if keeper is not None:
                keeper.close()
            self.free.put(None)


_starting = threading.Lock()


def ask(judge: str | tuple[str, ...], request: dict[str, Any], limits: Limits) -> Outcome:
    """What one judge says of one request.

    judge: of judges.MAKERS, which says what `request` holds; with its maker's arguments, if it takes any.
    Raises KeeperDied if no judge can be started.
    """
    with _starting:
        pool = _pool((judge,) if isinstance(judge, str) else judge, limits.memory_mb, limits.workers, os.getpid())
    return pool.ask(request, limits.seconds)


@cache
def _pool(judge: tuple[str, ...], memory_mb: int, workers: int, pid: int) -> Pool:
    return Pool(judge, memory_mb, workers)  # pid: a forked process must not share its parent's pipes
