"""Ray workers that start in a moment: forks of one process that has imported torch, transformers and vLLM already.

These imports cost each of a run's dozen processes about ten seconds of CPU, one after the other. On one machine
without accelerators the driver starts a template process, which does them once; Ray starts its workers
through `py_executable`, here this file as a tiny client, which hands its command line, environment and standard
streams to the template. The template forks, and the fork runs Ray's worker script as a fresh interpreter would.

Python's multiprocessing can start its processes so, too: `EXECUTABLE` names what to give to its `set_executable`.
Ray forgets the process that it starts, multiprocessing waits for it; so there the client stays, as the fork's stand-in:
it passes on signals and the exit code, and neither outlives the other.

Run as a script it is the client, and imports nothing but the standard library.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping

SOCKET, PYTHON = "template.sock", "python"
EXECUTABLE = "VERL_TRB_EXECUTABLE"  # environment variable of the workers: an interpreter that is a fork
STAND_IN = "--stand-in"
STARTS = "multiprocessing.spawn"  # in the command of a process of multiprocessing's
MOST_STREAMS = 250  # of one message; the kernel's limit is 253
PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that a process gets when its parent ends
SHARED = "VERL_TRB_TEMPLATE"  # environment variable: environment and py_executable of a template that stands
# What verl and vLLM import, but neither Ray nor verl themselves: they read their environment when imported.
MODULES = (
    "torch",
    "torch._inductor.lowering",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers",
    "tensordict",
    "pandas",
    "datasets",
    "peft",
    "scipy.stats",
    "networkx",
    "openai.types",
    "fastapi",
    "vllm.config",
    "vllm.model_executor.model_loader",
    "vllm.v1.worker.cpu_worker",
    "torchdata",
)


@contextlib.contextmanager
def shared_template(environment: Mapping[str, str], log: str) -> Iterator[None]:
    """Inside, `template` yields one template with this environment, in this process and in those it starts."""
    with template(environment, log) as py_executable:
        os.environ[SHARED] = json.dumps([dict(environment), py_executable])
        try:
            yield
        finally:
            del os.environ[SHARED]


@contextlib.contextmanager
def template(environment: Mapping[str, str], log: str) -> Iterator[str]:
    """Starts a template process, and yields the `py_executable` for Ray's runtime environment.

    environment: variables that the workers will have beside this process's; some are read by imports.
    log: file for what the template itself prints.
    """
    shared = json.loads(os.environ.get(SHARED, "[null, null]"))
    if shared[0] == dict(environment):
        yield shared[1]
        return
    with tempfile.TemporaryDirectory(prefix="verl_trb-") as folder:  # for this user only: so is the socket
        path = os.path.join(folder, SOCKET)
        client = f"{sys.executable} -I -S {os.path.abspath(__file__)}"
        with open(os.path.join(folder, PYTHON), "w") as script:
            script.write(f'#!/bin/sh\nexec {client} {STAND_IN} {path} "$@"\n')
        os.chmod(script.name, 0o700)
        with open(log, "ab") as output, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(256)  # from now on; who comes before the imports are done waits
            process = subprocess.Popen(
                [sys.executable, "-m", "verl_trb.prefork", str(listener.fileno())],
                pass_fds=[listener.fileno()],
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,  # closed when this process ends, however it ends: the template then ends too
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is the driver's business
            )
        try:
            yield f"{client} {path}"
        finally:
            process.kill()
            process.wait()


def serve(listener: socket.socket) -> None:
    """Imports, then forks a worker for every client until standard input ends."""
    import ctypes
    import gc
    import importlib
    import select
    import signal

    for module in MODULES:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # or the collector would touch, and so copy, every page in every fork
    library = ctypes.CDLL(None)
    watched: dict[int, socket.socket] = {}  # forks that have a stand-in: process id -> connection to it
    while True:
        ready, _, _ = select.select([listener, sys.stdin, *watched.values()], [], [], 1.0)
        if sys.stdin in ready:
            return
        for fork in [fork for fork, client in watched.items() if client in ready]:  # their stand-ins have gone
            os.kill(fork, signal.SIGKILL)  # it may be one that hangs; until it is reaped nobody else has its id
            watched.pop(fork).close()
        for fork in _reap():
            if fork in watched:
                watched.pop(fork).close()
        if listener not in ready:
            continue
        client, _ = listener.accept()
        try:
            message, streams = _receive(client)
        except (OSError, ValueError):  # it was killed while it asked
            client.close()
            continue
        fork = os.fork()
        if fork == 0:
            for other in [listener, *watched.values()]:
                other.close()
            os.setpgid(0, 0)  # Ray ends the process group of a worker that has gone: it must hold no other's workers
            if message["stays"]:
                library.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # without the template nobody watches the stand-in
            _become(message, streams, client)
        for stream in streams:
            os.close(stream)
        if message["stays"]:
            watched[fork] = client
        else:
            client.close()


def _reap() -> Iterator[int]:
    """The forks that have ended since the last call."""
    with contextlib.suppress(ChildProcessError):  # there are none at all
        while (fork := os.waitpid(-1, os.WNOHANG)[0]) > 0:
            yield fork


def _become(message: dict, streams: list[int], client: socket.socket) -> None:
    """In the fork: what a new interpreter with this command line would be. Does not return."""
    import fcntl
    import runpy
    import traceback

    import numpy as np
    import setproctitle

    code = 1
    try:
        free = max(message["streams"]) + 1

        def moved(descriptor: int) -> int:
            higher = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, free)
            os.close(descriptor)
            return higher

        client = socket.socket(fileno=moved(client.detach()))
        for number, stream in zip(message["streams"], list(map(moved, streams)), strict=True):
            os.dup2(stream, number)
            os.close(stream)
        if message["stays"]:
            setproctitle.getproctitle()  # finds where titles go, which it cannot once the environment has changed
        os.environ.clear()
        os.environ.update(message["environment"])
        os.chdir(message["folder"])
        np.random.seed()  # Python's own generator does this by itself
        if message["stays"]:
            client.sendall(f"{os.getpid()}\n".encode())
        else:
            client.close()
        sys.argv = message["command"]
        if sys.argv[0] == "-c":
            _, source, *arguments = sys.argv
            sys.argv = ["-c", *arguments]
            exec(source, {"__name__": "__main__"})
        else:
            sys.path.insert(0, os.path.dirname(sys.argv[0]))
            runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        with contextlib.suppress(OSError):
            client.sendall(f"{code}\n".encode())
        os._exit(code)


def _receive(client: socket.socket) -> tuple[dict, list[int]]:
    """The client's message and its streams. Raises OSError or ValueError where it has not said all of it."""
    data, streams, _, _ = socket.recv_fds(client, 1 << 16, MOST_STREAMS)
    try:
        while b"\n" not in data and (part := client.recv(1 << 16)):
            data += part
        return json.loads(data), streams
    except (OSError, ValueError):
        for stream in streams:
            os.close(stream)
        raise


def request(path: str, command: list[str]) -> None:
    """The client: asks the template for a worker; where there is none, becomes the worker itself.

    Not once it has asked: two workers with one id end Ray's control process.
    """
    try:
        server = _ask(path, command, [0, 1, 2], stays=False)
    except OSError:
        os.execv(sys.executable, [sys.executable, *command])
    with server, contextlib.suppress(OSError):
        server.recv(1)  # until the fork stands


def stand_in(path: str, command: list[str]) -> int:
    """The client that stays, having given all of its streams to the fork. Returns the fork's exit code."""
    import select
    import signal

    streams = [int(number) for number in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{number}")]
    try:
        source = command.index("-c")  # the interpreter's own flags come first
        # multiprocessing's other helpers import nothing that takes time: they stay what they are.
        if STARTS not in command[source + 1] or len(streams) > MOST_STREAMS:
            raise ValueError("no process to be forked")
        server = _ask(path, command[source:], streams, stays=True)
    except (OSError, ValueError):
        os.execv(sys.executable, [sys.executable, *command])
    try:
        fork = int(server.recv(16))
    except (OSError, ValueError):
        return 1  # the fork may have read what its parent sent: a second one would wait for it for ever
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: os.kill(fork, number))
    for stream in streams:
        os.close(stream)
    parent = os.getppid()
    while os.getppid() == parent:
        if select.select([server], [], [], 1.0)[0]:
            return int(server.recv(16) or 128 + signal.SIGKILL)
    return 1  # orphaned: when the connection closes, the template ends the fork


def _ask(path: str, command: list[str], streams: list[int], stays: bool) -> socket.socket:
    environment = {**os.environ, EXECUTABLE: os.path.join(os.path.dirname(path), PYTHON)}
    message = {"command": command, "environment": environment, "folder": os.getcwd(), "streams": streams}
    data = json.dumps({**message, "stays": stays}).encode() + b"\n"
    server = socket.socket(socket.AF_UNIX)
    server.connect(path)
    sent = socket.send_fds(server, [data], streams)
    if sent < len(data):  # sending nothing fails where the fork has closed the connection already
        server.sendall(data[sent:])
    return server


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(socket.socket(fileno=int(sys.argv[1])))
    elif sys.argv[1] == STAND_IN:
        sys.exit(stand_in(sys.argv[2], sys.argv[3:]))
    else:
        request(sys.argv[1], sys.argv[2:])
