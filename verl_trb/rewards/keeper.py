"""The sandbox's own program: keeps one judge process, gives it requests, and replaces it when it fails.

Started by sandbox.py; JSON lines in and out. The keeper imports the judge once and forks a process that
answers; a new one after a failure takes milliseconds. The forked process has limits on memory, processor time and
files, and can be killed at any moment. The keeper ends when its input does, so nothing is left when a run is killed.
"""

import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from verl_trb.rewards.judges import FUNCTION, MAKERS, Judge

REQUESTS_PER_PROCESS = 2000  # then a fresh one: sympy's caches grow
SPARE_CPU_SECONDS = 2  # a judge whose keeper was killed ends by itself
MOST_ERROR = 500  # characters
TIME_LIMIT, DIED, RAISED = "time limit", "died", "raised"
READY = b'"ready"'


class JudgeProcess:
    """A forked process that answers requests until one of them ends it."""

    def __init__(self, judge: Judge, memory: int, trusted: bool):
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(judge, memory, trusted, theirs, self.connection), daemon=True
        )
        self.process.start()
        theirs.close()
        self.requests = 0

    def ask(self, line: bytes, seconds: float) -> bytes:
        """What `main` answers, without the line's end; after "time limit" and "died" the process is gone."""
        self.requests += 1
        try:
            self.connection.send_bytes(line)
            if not self.connection.poll(seconds):
                self.end()
                return _failed(TIME_LIMIT)
            return self.connection.recv_bytes()
        except (EOFError, OSError):
            self.end()
            # SIGXCPU comes when a judge has used up its processor time just before the clock is seen.
            return _failed(TIME_LIMIT if self.process.exitcode == -signal.SIGXCPU else DIED)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(judge: Judge, memory: int, trusted: bool, connection: Connection, keepers_end: Connection) -> None:
    """trusted: what the judge prints goes to the standard error of the run, and it may write files."""
    keepers_end.close()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(2 if trusted and descriptor else nowhere, descriptor)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    if not trusted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    unlimited = resource.getrlimit(resource.RLIMIT_CPU)[1]
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        allowed = int(time.process_time() + request["seconds"]) + SPARE_CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (allowed, unlimited))
        try:
            answer = json.dumps({"verdict": judge(request)}, default=_plain).encode()
        except Exception as error:  # whatever a parser, a verifier or a user's function raises about an answer
            answer = _failed(RAISED, _said(error))
        connection.send_bytes(answer)


def _plain(value: Any) -> Any:
    """NumPy's and torch's numbers and arrays as JSON's."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a verdict holds a {type(value).__name__}, which JSON has not")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:MOST_ERROR]


def _failed(how: str, error: str = "") -> bytes:
    return json.dumps({"failed": how, "error": error}).encode()


def main(memory_mb: str, kind: str, *arguments: str) -> None:
    """Answers requests, one a line, until the input ends: each {"seconds": limit, ...} with what the judge needs.

    First it says READY, or what the maker raised. An answer is {"verdict": what the judge returned}, or {"failed":
    "time limit", "died" or "raised", "error": what was raised}. arguments: the judge's maker's.
    """
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a judge's module prints when it is imported is no reply

    def reply(answer: bytes) -> None:
        replies.write(answer + b"\n")

    try:
        judge = MAKERS[kind](*arguments)
    except Exception as error:
        return reply(_failed(RAISED, _said(error)))
    memory = int(memory_mb) * 2**20
    process: JudgeProcess | None = None
    reply(READY)
    for line in sys.stdin.buffer:
        if process is None or process.requests >= REQUESTS_PER_PROCESS or not process.process.is_alive():
            if process is not None:
                process.end()
            process = JudgeProcess(judge, memory, trusted=kind == FUNCTION)
        answer = process.ask(line, json.loads(line)["seconds"])
        if process.connection.closed:
            process = None
        reply(answer)
    if process is not None:
        process.end()
