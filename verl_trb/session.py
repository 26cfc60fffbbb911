"""Several runs without their slow beginning: imports are done once, and every run is a fork.

`run` is `python -m verl_trb.main` in a forked child of this process, which has imported all that a driver
needs; the workers of all runs are forks of one template (prefork.py). Each run still has its own Ray, so that nothing
of one run is left for the next.
"""

import contextlib
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from omegaconf import DictConfig

from verl_trb import composition
from verl_trb.prefork import shared_template

INTERRUPTED = (130, 143)  # exit codes after Ctrl-C and SIGTERM

# What a driver imports, beside the workers' modules.
DRIVER = (
    "verl_trb.preflight",
    "verl_trb.launch",
    "verl_trb.report.page",
    "verl_trb.tasks.prepare",
    "matplotlib.figure",
)


@contextlib.contextmanager
def session(arguments: Sequence[str], log: Path) -> Iterator[None]:
    """Inside, runs started with `run` begin fast, where the configuration of `arguments` forks its workers.

    log: file for what the template prints. Raises ConfigError for a configuration that cannot be.
    """
    configs: list[DictConfig] = []

    def take(config: DictConfig) -> int:
        configs.append(config)
        return 0

    composition.run(take, arguments)
    if not configs[0].trb.prefork:
        yield
        return
    variables = (configs[0].ray_kwargs.ray_init.get("runtime_env") or {}).get("env_vars") or {}
    log.parent.mkdir(parents=True, exist_ok=True)
    with shared_template(dict(variables), str(log)):
        for module in DRIVER:
            importlib.import_module(module)
        yield


def run(arguments: Sequence[str], screen: Path) -> int:
    """One command line of verl_trb.main in a fork of this process. Returns its exit code, 128 + n after signal n.

    screen: file that gets what it prints.
    """
    return next(run_each([(arguments, screen)]))[1]


def run_each(commands: Sequence[tuple[Sequence[str], Path]], jobs: int = 1) -> Iterator[tuple[int, int]]:
    """`run` for every (arguments, screen), `jobs` of them side by side. Yields index and exit code as they end.

    After one that Ctrl-C or SIGTERM ended no other is begun; those that are under way are waited for.
    """
    waiting = list(enumerate(commands))
    children: dict[int, int] = {}  # process id -> index

    def pass_on(number: int, frame: object) -> None:
        waiting.clear()
        for child in children:
            os.kill(child, number)

    # Ctrl-C reaches the runs too; all end in order, first the runs.
    handlers = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda number, frame: waiting.clear()),
        signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on),
    }
    try:
        while waiting or children:
            while waiting and len(children) < jobs:
                index, command = waiting.pop(0)
                children[start(*command)] = index
            for child in list(children):
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    code = os.waitstatus_to_exitcode(status)
                    code = 128 - code if code < 0 else code
                    if code in INTERRUPTED:
                        waiting.clear()
                    yield children.pop(child), code
            time.sleep(0.05)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def start(arguments: Sequence[str], screen: Path) -> int:
    """Begins one command line of verl_trb.main in a fork of this process, whose id it returns."""
    sys.stdout.flush(), sys.stderr.flush()
    child = os.fork()  # the imports have left no thread that it would miss
    if child:
        return child
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        output = os.open(screen, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False, buffering=1) for number in (1, 2))
        from verl_trb.main import main

        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
