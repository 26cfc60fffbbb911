"""Start Ray, run the trainer in it, show what it says, and leave nothing behind.

The driver is this process; the trainer is a Ray actor (so it may stand on another node), which the driver asks
for its events. Everything the workers print goes to log files.
"""

import contextlib
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import ray
from omegaconf import DictConfig, OmegaConf, open_dict
from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

from verl_trb import compat
from verl_trb.display import Display
from verl_trb.errors import UserError
from verl_trb.shared_memory import remove_orphans
from verl_trb.training.task_runner import DistillationTaskRunner

POLL_SECONDS = 0.25
SHOWN = ("stage", "step", "warning", "error")  # the others are for the summary


def launch(config: DictConfig, display: Display, py_executable: str | None = None) -> int:
    """Run a config that `completed` has filled in, to its end.

    py_executable: what Ray starts its workers with (prefork.py), instead of this Python.

    Returns:
        0 when training finished, 1 when it failed (the display has said why), 130 after Ctrl-C or SIGTERM.
    """
    run_dir = Path(config.trb.run_dir)
    before = signal.signal(signal.SIGTERM, _interrupt)
    started, runner = time.time(), None
    try:
        compat.assert_platform_registered()
        display.stage("starting Ray")
        _start_ray(config, py_executable)
        signal.signal(signal.SIGTERM, _interrupt)  # Ray has put its own handler there
        actor_class: Any = DistillationTaskRunner
        runner = actor_class.options(max_concurrency=2).remote()
        return _follow(runner, config, display)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave processes behind
        display.warning("interrupted: stopping the workers; the same command resumes from the last checkpoint")
        if runner is not None:
            ray.kill(runner)  # first of all: the trainer would go on while the others end
        return 130
    finally:
        _stop_ray(run_dir)
        remove_orphans(since=started)
        signal.signal(signal.SIGTERM, before)


def completed(config: DictConfig) -> DictConfig:
    """The config with what follows from it filled in, and `trb` where workers and servers see it.

    verl hands them their own sections only: `rollout.custom` carries ours.
    """
    config = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    trb, rollout = config.trb, config.actor_rollout_ref.rollout
    with open_dict(config):
        trb.teacher.dtype = trb.teacher.dtype or rollout.dtype
        rollout.custom = {"trb": trb}
    return config


def _interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


def _start_ray(config: DictConfig, py_executable: str | None) -> None:
    if ray.is_initialized():
        return
    kwargs = OmegaConf.to_container(config.ray_kwargs.get("ray_init", {}), resolve=True)
    runtime_env = OmegaConf.to_container(OmegaConf.create(get_ppo_ray_runtime_env(config)), resolve=True)
    runtime_env.setdefault("env_vars", {})["TRANSFER_QUEUE_ENABLE"] = "1"
    given = kwargs.pop("runtime_env", None) or {}
    runtime_env["env_vars"].update(given.pop("env_vars", {}))
    runtime_env.update(given)
    if py_executable is not None:
        runtime_env["py_executable"] = py_executable
    try:
        ray.init(log_to_driver=False, runtime_env=runtime_env, **{k: v for k, v in kwargs.items() if v is not None})
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"Ray could not be started: {error}") from error


def _follow(runner: Any, config: DictConfig, display: Display) -> int:
    """Show the runner's events until it is done."""
    running = runner.run.remote(config)
    seen = 0
    while True:
        done, _ = ray.wait([running], timeout=POLL_SECONDS)
        events = _events(runner, seen)
        for event in events:
            if event["kind"] in SHOWN:
                display.handle(event)
        seen += len(events)
        if done:
            break
    try:
        ray.get(running)
    except ray.exceptions.RayTaskError as error:
        display.error(f"{_reason(error)} (the workers' output is in {config.trb.run_dir}/logs)")
        return 1
    except ray.exceptions.RayError as error:
        display.error(f"the trainer process died: {_reason(error)} (logs: {config.trb.run_dir}/logs)")
        return 1
    return 0


def _events(runner: Any, seen: int) -> list[dict[str, Any]]:
    try:
        return ray.get(runner.events.remote(seen))
    except ray.exceptions.RayError:
        return []


def _reason(error: ray.exceptions.RayError) -> str:
    """The innermost cause in one sentence; the traceback is in the logs."""
    cause: BaseException = error
    while isinstance(cause, ray.exceptions.RayTaskError) and isinstance(cause.cause, BaseException):
        cause = cause.cause
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1] if lines else cause}"


def _stop_ray(run_dir: Path) -> None:
    """Shut Ray down, wait until the processes it had here are gone, and keep their logs in the run's folder."""
    if not ray.is_initialized():
        return
    node, job = ray._private.worker.global_worker.node, ray.get_runtime_context().get_job_id()
    own, logs = node.is_head(), Path(node.get_logs_dir_path())  # a cluster that stood before keeps its own
    processes = psutil.Process().children(recursive=True)
    ray.shutdown()
    _, alive = psutil.wait_procs(processes, timeout=10)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=10)
    target = run_dir / "logs" / time.strftime("%Y%m%d-%H%M%S")
    target.mkdir(parents=True, exist_ok=True)
    for file in logs.glob("*" if own else f"worker-*-{job}-*"):
        if file.is_file():
            shutil.copy2(file, target)
    if own:
        shutil.rmtree(logs.parent, ignore_errors=True)
        latest = logs.parent.with_name("session_latest")  # a link that may point to what has just gone
        if latest.is_symlink() and not latest.exists():
            latest.unlink()
