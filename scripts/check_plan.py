"""Is the plan right? Memory and times of the real stack on this CPU, for three sizes of models, beside the plan's.

    python scripts/check_plan.py FOLDER            # models and runs go there; about 3 minutes a size on 2 idle cores
    python scripts/check_plan.py FOLDER --sizes small

Each size is three training steps of `recipe=quickstart` with random models. Memory is anonymous memory of the training
worker and of the engine (RssAnon, twenty times a second), less what the interpreters and libraries take: that is found
with models of 0.1M parameters. Prints planned, measured and their ratio (docs/planning.md).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from bench_models import make_models, shape, write_prompts

from verl_trb import composition
from verl_trb.dry_run import fill_in_prepared
from verl_trb.planning.devices import Cluster, Device, this_cpu
from verl_trb.planning.job import job_of, workload_of
from verl_trb.planning.memory import Job, engine, loss_phase, optimizer_phase, resident
from verl_trb.planning.roofline import tv_bound
from verl_trb.planning.times import step_time

# Student and teacher; V = 32,000, tied.
SIZES = {
    "small": (shape(256, 768, 4, 4, 2), shape(512, 1536, 8, 8, 4)),  # 11M <- 42M
    "medium": (shape(512, 1536, 8, 8, 4), shape(768, 2304, 20, 12, 6)),  # 42M <- 166M
    "large": (shape(512, 1536, 8, 8, 4), shape(1024, 3072, 24, 16, 8)),  # 42M <- 335M
}
STEPS, EPSILON = 3, 0.02
OVERRIDES = {
    "trb.epsilon": EPSILON,
    "trb.policy": "fixed_epsilon",
    "trb.loss_chunk_tokens": 256,
    "data.train_batch_size": 16,
    "data.max_prompt_length": 32,
    "data.max_response_length": 64,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 16,
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 8,
    "actor_rollout_ref.actor.optim.lr": "1e-5",
    "actor_rollout_ref.rollout.max_num_seqs": 16,
    "trainer.total_training_steps": STEPS,
    "trainer.test_freq": -1,
    "trainer.save_freq": -1,
    "trainer.val_before_train": "false",
    "trb.sample_prompts": 0,
}
WORKER, ENGINE = "WorkerDict", "VLLM::EngineCore"


@dataclass
class Measured:
    """Bytes at rest (during rollouts), at most in a step, and at most before the first; seconds of the last step."""

    worker_rest: int
    worker_peak: int
    worker_loading: int
    engine: int
    rollouts: float
    update: float


def overrides(folder: Path, size: str) -> list[str]:
    own = [f"{key}={value}" for key, value in OVERRIDES.items()]
    if size == "baseline":
        return ["recipe=quickstart", *own, f"trb.cache_dir={folder}/cache"]
    student, teacher = make_models(folder / size, dict(zip(("student", "teacher"), SIZES[size], strict=True)))
    data = folder / "prompts.parquet"
    write_prompts(data, 64, 31)
    paths = {"actor_rollout_ref.model.path": student, "trb.teacher.path": teacher, "data.train_files": data,
             "data.val_files": data, "trb.prepare": "null"}  # fmt: skip
    return ["recipe=quickstart", *own, *(f"{key}={value}" for key, value in paths.items())]


def run(folder: Path, size: str, number: int = 0) -> Measured:
    """The real run, watched."""
    run_dir = folder / f"run-{size}-{os.getpid()}-{number}"
    command = [sys.executable, "-m", "verl_trb.main", *overrides(folder, size), f"trb.run_dir={run_dir}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    seen: list[tuple[float, str, int]] = []
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, seen, done))
    watcher.start()
    metrics_file = run_dir / "metrics.jsonl"
    lines: dict[int, tuple[float, dict[str, Any]]] = {}
    while process.poll() is None:
        with contextlib.suppress(OSError):
            for line in metrics_file.read_text().splitlines():
                row = json.loads(line)
                lines.setdefault(row["step"], (time.time(), row))
        time.sleep(0.05)
    done.set()
    watcher.join()
    if process.returncode or STEPS not in lines:
        raise SystemExit(f"the run of {size} failed; see {run_dir}/logs")
    started = lines[1][0] - lines[1][1]["timing_s/step"]
    ended, last = lines[STEPS]
    begun = ended - last["timing_s/step"]

    def most(name: str, low: float, high: float) -> int:
        return max((size_ for at, process_, size_ in seen if name in process_ and low <= at < high), default=0)

    return Measured(
        worker_rest=most(WORKER, begun, begun + 0.8 * last["timing_s/gen"]),
        worker_peak=most(WORKER, started, ended),
        worker_loading=most(WORKER, 0, started),
        engine=most(ENGINE, started, ended),
        rollouts=last["timing_s/gen"],
        update=last["timing_s/update_actor"],
    )


def _watch(pid: int, seen: list[tuple[float, str, int]], done: threading.Event) -> None:
    """Appends (time, process title, RssAnon) of every process below `pid`."""
    parent = psutil.Process(pid)
    while not done.is_set():
        with contextlib.suppress(psutil.Error):
            for child in parent.children(recursive=True):
                with contextlib.suppress(OSError, psutil.Error):
                    title = Path(f"/proc/{child.pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
                    if WORKER in title or ENGINE in title:
                        status = Path(f"/proc/{child.pid}/status").read_text()
                        anonymous = int(status.split("RssAnon:")[1].split()[0]) * 1024
                        seen.append((time.time(), title, anonymous))
        time.sleep(0.05)


def planned(folder: Path, size: str, device: Device) -> tuple[Job, dict[str, float]]:
    """The plan's numbers for the same overrides."""
    kept: dict[str, float] = {}
    jobs: list[Job] = []

    def plan(config: Any) -> int:
        fill_in_prepared(config)
        cluster = Cluster(1, 1, device)
        job = job_of(config, cluster)
        times = step_time(job, workload_of(config, 64), cluster, tv_bound(EPSILON))
        rest = sum(resident(job).values())
        busiest = max(sum(loss_phase(job).values()), sum(optimizer_phase(job).values()))
        kept.update(
            worker_rest=rest,
            worker_peak=rest + busiest,
            engine=sum(engine(job).values()),
            rollouts=times.rollouts,
            update=times.update,
        )
        jobs.append(job)
        return 0

    composition.run(plan, [*overrides(folder, size), f"trb.run_dir={folder}/none"])
    return jobs[0], kept


def processes(folder: Path, device: Device) -> dict[str, float]:
    """Bytes of the processes whatever the models: measured with the smallest, less the plan's. Kept in `folder`."""
    kept = folder / "processes.json"
    if not kept.exists():
        base = run(folder, "baseline")
        _, plan = planned(folder, "baseline", device)
        names = "worker_rest", "worker_peak", "engine"
        kept.write_text(json.dumps({name: getattr(base, name) - plan[name] for name in names}))
    return json.loads(kept.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=tuple(SIZES))
    args = parser.parse_args()
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    device = this_cpu()
    print(
        f"this CPU: {device.flops / 1e9:.0f} GFLOP/s, {device.bandwidth / 1e9:.1f} GB/s (one thread where OMP says so)"
    )
    own = processes(folder, device)
    print("the processes themselves, MiB: " + ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in own.items()))
    print(f"{'':24}{'planned':>12}{'measured':>12}{'ratio':>8}")
    for size in args.sizes:
        job, plan = planned(folder, size, device)
        got = run(folder, size)
        print(f"{size}: {job.student.parameters / 1e6:.0f}M <- {job.teacher.parameters / 1e6:.0f}M")
        rows = {name: (plan[name], getattr(got, name) - mine) for name, mine in own.items()}
        rows["in all"] = (plan["worker_peak"] + plan["engine"], rows["worker_peak"][1] + rows["engine"][1])
        for name, (expected, found) in rows.items():
            print(f"  {name + ', MiB':22}{expected / 2**20:12,.0f}{found / 2**20:12,.0f}{expected / found:8.2f}")
        print(f"  {'(loading, MiB)':22}{'':12}{(got.worker_loading - own['worker_peak']) / 2**20:12,.0f}")
        for name in ("rollouts", "update"):
            expected, found = plan[name], getattr(got, name)
            print(f"  {name + ', s':22}{expected:12.2f}{found:12.2f}{expected / found:8.2f}", flush=True)


if __name__ == "__main__":
    main()
