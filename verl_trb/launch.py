"""Start Ray or join a cluster, run the trainer in it, show what it says, and leave nothing behind.

The driver is this process; the trainer is a Ray actor (so it may stand on another node), which the driver asks
for its events. Everything the workers print goes to log files.
"""

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import ray
from omegaconf import DictConfig, OmegaConf, open_dict
from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

from verl_trb import cluster, compat, prefork
from verl_trb.checkpoints import find
from verl_trb.display import Display
from verl_trb.dry_run import placement_rows
from verl_trb.errors import ComponentLost, RunError, UserError
from verl_trb.faults import explain, first_line
from verl_trb.placement import COLUMNS, shown
from verl_trb.ray_address import answers, cluster_address
from verl_trb.redaction import redact_file, redacted, secrets
from verl_trb.shared_memory import remove_orphans
from verl_trb.training.task_runner import DistillationTaskRunner

POLL_SECONDS = 0.25
LOST_SECONDS = 15.0  # for the trainer to say by itself what a process that has ended means
HEAD_SECONDS = 15.0  # for Ray's control process to answer again; without it Ray ends every process after 60, unheard
RAY_STARTS = 3
# What Ray's control process keeps of past tasks, for its dashboard: 100,000 of them by default, which are 400 MB after
# 7,000 steps, and the ids of up to 1,000,000 that it keeps no more.
TASK_RECORDS = (
    "RAY_task_events_max_num_task_in_gcs",
    "RAY_task_events_max_dropped_task_attempts_tracked_per_job_in_gcs",
)
SHOWN = ("stage", "step", "warning", "error")  # the others are for the summary


def launch(config: DictConfig, display: Display, py_executable: str | None = None) -> int:
    """Run a config that `completed` has filled in, to its end.

    When a process of the run has died or hangs, everything is started again from the last checkpoint, up to
    trb.max_restarts times.

    py_executable: what Ray starts its workers with (prefork.py), instead of this Python.

    Returns:
        0 when training finished, 1 when it failed (the display has said why), 130 after Ctrl-C or SIGTERM.
    """
    restarts = 0
    while True:
        try:
            return _attempt(config, display, py_executable, restarts)
        except RunError as error:
            root = Path(config.trainer.default_local_dir)
            again = isinstance(error, ComponentLost) and restarts < config.trb.max_restarts
            if not again or find(root).newest is None:
                display.error(f"{error} (the workers' output is in {config.trb.run_dir}/logs)")
                return 1
            restarts += 1
            said = f"starting again from step {find(root).step}, {restarts} of at most {config.trb.max_restarts} times"
            display.warning(f"{error}; {said}")
            config.trainer.resume_mode = "auto"


def _attempt(config: DictConfig, display: Display, py_executable: str | None, restarts: int) -> int:
    """From Ray's start to its end. Raises RunError when the run cannot go on."""
    run_dir = Path(config.trb.run_dir)
    before = signal.signal(signal.SIGTERM, _interrupt)
    started, runner = time.time(), None
    known = secrets(OmegaConf.to_container(config.ray_kwargs))
    try:
        compat.assert_platform_registered()
        address = cluster_address(config)
        display.stage(f"joining the Ray cluster {address}" if address else "starting Ray")
        _start_ray(config, py_executable, address)
        signal.signal(signal.SIGTERM, _interrupt)  # Ray has put its own handler there
        _look_at_cluster(config, display, joined=address is not None)
        actor_class: Any = DistillationTaskRunner
        runner = actor_class.options(max_concurrency=2).remote()
        _follow(runner, config, display, restarts)
        return 0
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave processes behind
        display.warning("interrupted: stopping the workers; the same command resumes from the last checkpoint")
        if runner is not None:
            ray.kill(runner)  # first of all: the trainer would go on while the others end
        return 130
    finally:
        _stop_ray(run_dir, known)
        remove_orphans(since=started)
        for file in (run_dir / "logs").glob("*.log"):
            redact_file(file, known)
        signal.signal(signal.SIGTERM, before)


def completed(config: DictConfig) -> DictConfig:
    """The config with what follows from it filled in, and `trb` where workers and servers see it.

    verl hands them their own sections only: `rollout.custom` carries ours.
    """
    config = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    trb, rollout = config.trb, config.actor_rollout_ref.rollout
    with open_dict(config):
        trb.teacher.dtype = trb.teacher.dtype or rollout.dtype
        if trb.deterministic:
            config.actor_rollout_ref.actor.fsdp_config.full_determinism = True
            config.actor_rollout_ref.actor.fsdp_config.seed = trb.seed
        rollout.custom = {"trb": trb}
    return config


def _interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


def _start_ray(config: DictConfig, py_executable: str | None, address: str | None) -> None:
    """address: of the cluster to join, None for a Ray of our own."""
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
    if address is not None:
        kwargs = cluster.joining_arguments(kwargs)
    else:
        for name in TASK_RECORDS:
            os.environ.setdefault(name, "10000")
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    others = set(psutil.Process().children(recursive=True))
    for attempt in range(1, RAY_STARTS + 1):
        try:
            ray.init(log_to_driver=False, runtime_env=runtime_env, **kwargs)
            return
        except Exception as error:  # Ray raises plain ones too
            ray.shutdown()
            for process in set(psutil.Process().children(recursive=True)) - others:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            if address is not None:
                raise UserError(
                    f"The Ray cluster {address} cannot be joined ({first_line(error).rstrip('.')}); if it stands and "
                    "asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE."
                ) from error
            # Ray gives its own processes 30 s, which a busy machine may need more than once.
            if "timed out" not in str(error) or attempt == RAY_STARTS:
                raise UserError(f"Ray could not be started: {first_line(error)}") from error


def _look_at_cluster(config: DictConfig, display: Display, joined: bool) -> None:
    """Refuses a cluster that cannot hold the run, and shows what will live where. Raises UserError."""
    if not joined:
        return cluster.check_room(cluster.nodes(), config)
    if not cluster.asks_for_token(ray.get_runtime_context().gcs_address):
        display.warning(
            "this Ray cluster asks for no token: whoever reaches its ports can run code on it as you; start it with "
            "scripts/ray_cluster.sh (docs/cluster.md)"
        )
    display.stage("checking the nodes of the cluster")
    found = cluster.living_nodes(config)
    able = [node.address for node in found for _ in range(node.groups(config.trainer.n_gpus_per_node))]
    # With more room than the run takes, Ray chooses.
    addresses = able if len(able) == config.trainer.nnodes else []
    display.table("Placement", COLUMNS, shown(placement_rows(config, addresses)))


def _follow(runner: Any, config: DictConfig, display: Display, restarts: int) -> None:
    """Show the runner's events until it is done. Raises RunError, ComponentLost if nothing moves any more."""
    told = config.copy()  # trackers are given the whole configuration
    told.ray_kwargs = redacted(OmegaConf.to_container(config.ray_kwargs))
    running = runner.run.remote(told, restarts)
    seen, doing, heard = 0, "the trainer's start", time.monotonic()
    lost, lost_at = "", 0.0
    head = _Head()
    while True:
        done, _ = ray.wait([running], timeout=POLL_SECONDS)
        events = _events(runner, seen)
        for event in events:
            if event["kind"] in SHOWN:
                display.handle(event)
            elif event["kind"] == "doing":
                doing = event["text"]
            elif event["kind"] == "lost":
                lost, lost_at = event["text"], time.monotonic()
        seen += len(events)
        heard = time.monotonic() if events else heard
        if done:
            break
        if lost and time.monotonic() - lost_at > LOST_SECONDS:
            raise ComponentLost(lost)
        if head.has_gone():
            raise ComponentLost(f"Ray's control process (gcs_server at {head.address}) ended during {doing}")
        if time.monotonic() - heard > config.trb.stall_seconds:
            limit = f"{config.trb.stall_seconds:g} s (trb.stall_seconds)"
            raise ComponentLost(f"nothing has moved for {limit}; what the run was at: {doing}")
    try:
        ray.get(running)
    except ray.exceptions.RayError as error:
        raise explain(error, doing) from None


class _Head:
    """Ray's control process, which takes connections while it lives."""

    def __init__(self) -> None:
        self.address = ray.get_runtime_context().gcs_address
        self.asked = self.heard = time.monotonic()
        self.reachable = answers(self.address)  # a driver outside the cluster may not reach it

    def has_gone(self) -> bool:
        """It has not answered for HEAD_SECONDS; asked a few times in them."""
        if self.reachable and time.monotonic() - self.asked > HEAD_SECONDS / 3:
            self.asked = time.monotonic()
            self.heard = self.asked if answers(self.address) else self.heard
        return self.asked - self.heard >= HEAD_SECONDS


def _events(runner: Any, seen: int) -> list[dict[str, Any]]:
    try:
        return ray.get(runner.events.remote(seen), timeout=60)
    except ray.exceptions.RayError:  # it is busy, or gone, which `running` tells
        return []


def _processes(logs: Path | None) -> list[psutil.Process]:
    """The run's processes on this machine, without the template, which serves the next start, too.

    logs: where its own Ray keeps what they print; with that those that a template of several runs has forked, which are
    no children of this process.
    """
    this = psutil.Process()
    found = set(this.children(recursive=True))
    for child in this.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if prefork.__name__ in child.cmdline():
                found.discard(child)
    for process in psutil.process_iter() if logs is not None else ():
        with contextlib.suppress(OSError):  # ended, or another user's
            if Path(os.readlink(f"/proc/{process.pid}/fd/1")).parent == logs:
                found.add(process)
    return list(found)


def _stop_ray(run_dir: Path, known: set[str]) -> None:
    """Shut Ray down, wait until the processes it had here are gone, and keep their logs in the run's folder, without
    the secrets in `known`.
    """
    if not ray.is_initialized():
        return
    node = ray._private.worker.global_worker.node
    own, logs = node.is_head(), Path(node.get_logs_dir_path())  # a cluster that stood before keeps its own
    target = run_dir / "logs" / time.strftime("%Y%m%d-%H%M%S")
    target.mkdir(parents=True, exist_ok=True)
    if not own and answers(ray.get_runtime_context().gcs_address):
        cluster.collect_logs(cluster.nodes(), target)
        for file in filter(Path.is_file, target.rglob("*")):
            redact_file(file, known)
    processes = _processes(logs if own else None)
    ray.shutdown()
    _, alive = psutil.wait_procs(processes, timeout=10)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=10)
    if own:
        for file in filter(Path.is_file, logs.glob("*")):
            redact_file(Path(shutil.copy2(file, target)), known)
        shutil.rmtree(logs.parent, ignore_errors=True)
        latest = logs.parent.with_name("session_latest")  # a link that may point to what has just gone
        if latest.is_symlink() and not latest.exists():
            latest.unlink()
