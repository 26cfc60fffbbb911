"""Start Ray, run the trainer in it, show what it says, and leave nothing behind.

The driver is this process; the trainer is a Ray actor (so it may stand on another node), which the driver asks
for its events. Everything the workers print goes to log files.
"""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import ray
from omegaconf import DictConfig, OmegaConf, open_dict
from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

from verl_trb.display import Display
from verl_trb.errors import UserError
from verl_trb.training.task_runner import DistillationTaskRunner

POLL_SECONDS = 0.25
SHOWN = ("stage", "step", "warning", "error")  # the others are for the summary


def launch(config: DictConfig, display: Display) -> int:
    """Run a resolved, checked config to its end.

    Returns:
        0 when training finished, 1 when it failed (the display has said why), 130 after Ctrl-C.
    """
    config = _with_trb_in_workers(config)
    run_dir = Path(config.trb.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, run_dir / "config.yaml", resolve=True)
    interrupted = False
    # A second Ctrl-C during the clean-up must not leave processes behind.
    signal.signal(signal.SIGTERM, lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        display.stage("starting Ray")
        _start_ray(config)
        runner = DistillationTaskRunner.options(max_concurrency=2).remote()
        return _follow(runner, config, display)
    except KeyboardInterrupt:
        interrupted = True
        display.warning("interrupted: stopping the workers")
        return 130
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _stop_ray(run_dir)
        if interrupted:
            display.warning(f"stopped; run the same command again to resume from the last checkpoint in {run_dir}")


def _with_trb_in_workers(config: DictConfig) -> DictConfig:
    """verl hands its workers and servers their own sections only: `rollout.custom` carries ours to them."""
    config = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    with open_dict(config):
        config.actor_rollout_ref.rollout.custom = {"trb": config.trb}
    return config


def _start_ray(config: DictConfig) -> None:
    if ray.is_initialized():
        return
    kwargs = OmegaConf.to_container(config.ray_kwargs.get("ray_init", {}), resolve=True)
    runtime_env = OmegaConf.to_container(OmegaConf.create(get_ppo_ray_runtime_env(config)), resolve=True)
    runtime_env.setdefault("env_vars", {})["TRANSFER_QUEUE_ENABLE"] = "1"
    given = kwargs.pop("runtime_env", None) or {}
    runtime_env["env_vars"].update(given.pop("env_vars", {}))
    runtime_env.update(given)
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
        events = ray.get(runner.events.remote(seen)) if not done else _last_events(runner, seen)
        for event in events:
            if event["kind"] in SHOWN:
                display.handle(event)
        seen += len(events)
        if done:
            break
    try:
        ray.get(running)
    except ray.exceptions.RayTaskError as error:
        display.error(_reason(error))
        return 1
    except ray.exceptions.RayActorError as error:
        display.error(f"the trainer process died: {error}")
        return 1
    return 0


def _last_events(runner: Any, seen: int) -> list[dict[str, Any]]:
    try:
        return ray.get(runner.events.remote(seen))
    except ray.exceptions.RayError:
        return []


def _reason(error: ray.exceptions.RayTaskError) -> str:
    """The innermost cause in one sentence; the traceback is in the logs."""
    cause: BaseException = error
    while isinstance(cause, ray.exceptions.RayTaskError) and isinstance(cause.cause, BaseException):
        cause = cause.cause
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1] if lines else cause}"


def _stop_ray(run_dir: Path) -> None:
    """Shut Ray down and keep its workers' logs in the run's folder."""
    if not ray.is_initialized():
        return
    logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    ray.shutdown()
    target = run_dir / "logs" / time.strftime("%Y%m%d-%H%M%S")
    if logs.is_dir():
        shutil.copytree(logs, target, ignore=shutil.ignore_patterns("old"), dirs_exist_ok=True, symlinks=True)
        shutil.rmtree(logs.parent, ignore_errors=True)


def logs_hint() -> str:
    return os.path.join("logs", "*", "worker-*.err")
