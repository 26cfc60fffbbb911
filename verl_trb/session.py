"""Several runs one after the other without their slow beginning: imports are done once, and every run is a fork.

`Session.run` is `python -m verl_trb.main` in a forked child of this process, which has imported all that a driver
needs; the workers of all runs are forks of one template (prefork.py). Each run still has its own Ray, so that nothing
of one run is left for the next.
"""

import contextlib
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from omegaconf import DictConfig

from verl_trb import composition
from verl_trb.prefork import shared_template

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
    sys.stdout.flush(), sys.stderr.flush()
    child = os.fork()  # the imports have left no thread that it would miss
    if child == 0:
        code = 1
        try:
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
    handlers = {  # Ctrl-C reaches the run too; both end in order, first the run
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, frame: os.kill(child, number)),
    }
    try:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code
