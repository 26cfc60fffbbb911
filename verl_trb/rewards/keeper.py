"""The sandbox's own program: keeps one judge process, gives it requests, and replaces it when it fails.

Started by sandbox.py; JSON lines in, one word a line out. The keeper imports the judge once and forks a process that
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

from verl_trb.rewards.judges import MAKERS, Judge

REQUESTS_PER_PROCESS = 2000  # then a fresh one: sympy's caches grow
SPARE_CPU_SECONDS = 2  # a judge whose keeper was killed ends by itself


class JudgeProcess:
    """A forked process that answers requests until one of them ends it."""

    def __init__(self, judge: Judge, memory: int):
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(judge, memory, theirs, self.connection), daemon=True)
        self.process.start()
        theirs.close()
        self.requests = 0

    def ask(self, line: bytes, seconds: float) -> str:
        """ "right", "wrong", "time limit", or "died"; after the last two the process is gone."""
        self.requests += 1
        try:
            self.connection.send_bytes(line)
            if not self.connection.poll(seconds):
                self.end()
                return "time limit"
            return "right" if self.connection.recv_bytes(1) == b"1" else "wrong"
        except (EOFError, OSError):
            self.end()
            # SIGXCPU comes when a judge has used up its processor time just before the clock is seen.
            return "time limit" if self.process.exitcode == -signal.SIGXCPU else "died"

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(judge: Judge, memory: int, connection: Connection, keepers_end: Connection) -> None:
    keepers_end.close()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
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
            right = judge(request)
        except Exception:  # whatever a parser or verifier raises about an answer
            right = False
        connection.send_bytes(b"1" if right else b"0")


def main(kind: str, memory_mb: str) -> None:
    """Answers requests, one a line, until the input ends: each {"seconds": limit, ...} with what the judge needs."""
    judge = MAKERS[kind]()
    memory = int(memory_mb) * 2**20
    process: JudgeProcess | None = None
    _reply("ready")
    for line in sys.stdin.buffer:
        if process is None or process.requests >= REQUESTS_PER_PROCESS or not process.process.is_alive():
            if process is not None:
                process.end()
            process = JudgeProcess(judge, memory)
        outcome = process.ask(line, json.loads(line)["seconds"])
        if outcome in ("time limit", "died"):
            process = None
        _reply(outcome)
    if process is not None:
        process.end()


def _reply(outcome: str) -> None:
    sys.stdout.write(f"{outcome}\n")
    sys.stdout.flush()
