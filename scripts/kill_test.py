"""Kills a run at random moments, resumes it each time, and compares what it became with a run nobody touched.

    .venv/bin/python scripts/kill_test.py runs/kill_test --kills 30

Both are the quickstart's toy pair under trb.deterministic=true with a checkpoint every step, in the folders
FOLDER/untouched and FOLDER/killed. A kill is a SIGKILL of the driver and everything below it, at a random moment of an
activity that status.json names: rollouts, training, checkpoint, weights, in turn. After each kill: the last complete
checkpoint is the one the next start resumes from, and no half-written folder passes for complete. In the end every
metric of every step, but times and memory, must be the same number as the untouched run's. The folder keeps count, so
the same command goes on where it was stopped; --kills N is how many are wanted in all, --minutes M stops after about M
minutes.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

from verl_trb.checkpoints import find
from verl_trb.report import read_metrics

STEPS = 12
ACTIVITIES = {
    "rollouts": "the rollouts",
    "training": "the training",
    "checkpoint": "the checkpoint",
    "weights": "sending",
}
SETTINGS = [
    "recipe=quickstart",
    "trb.deterministic=true",
    "trb.warmup_steps=8",
    f"trainer.total_training_steps={STEPS}",
    "trainer.save_freq=1",
    "trainer.test_freq=6",
    "trainer.val_before_train=false",
    "data.val_max_samples=8",
    "data.train_batch_size=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
]
# What a rerun does not repeat: clocks, memory, and how often the driver started again.
VARYING = ("timing", "perf/", "trb/restarts")


def start(run_dir: Path, overrides: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "verl_trb.main", *SETTINGS, f"trb.run_dir={run_dir}", *overrides]
    output = open(run_dir.with_suffix(".out"), "a")
    return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL for the driver and all its descendants."""
    root = psutil.Process(process.pid)
    family = [root, *root.children(recursive=True)]
    for member in family:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            pass
    psutil.wait_procs(family, timeout=30)
    process.wait()


def status(run_dir: Path) -> dict:
    try:
        return json.loads((run_dir / "status.json").read_text())
    except (OSError, ValueError):
        return {}


def one_kill(run_dir: Path, overrides: list[str], activity: str, chance: random.Random) -> dict | None:
    """Starts or resumes the run and kills it in `activity`, some steps later; None if the run ended before."""
    expected = find(run_dir / "checkpoints").step
    lines_before = _lines(run_dir)
    process, steps = start(run_dir, overrides), chance.choice((1, 1, 2))
    deadline = time.monotonic() + 400
    while process.poll() is None:
        now = status(run_dir)
        fresh = now.get("since", 0) > process_start(process)
        if fresh and now["doing"].startswith(ACTIVITIES[activity]) and now["step"] >= expected + steps:
            time.sleep(chance.expovariate(1 / 0.05))
            break
        if time.monotonic() > deadline:
            kill(process)
            raise SystemExit(f"no progress in 400 s: {now}; see {run_dir.with_suffix('.out')}")
        time.sleep(0.002)
    if process.poll() is not None:
        return None
    at = status(run_dir)
    kill(process)
    resumed = [line["step"] for line in _lines(run_dir)[len(lines_before) :]]
    if resumed and resumed[0] != expected + 1:
        raise SystemExit(f"the run went on at step {resumed[0]}, but its checkpoint was of step {expected}")
    found = find(run_dir / "checkpoints")
    half = [folder.name for folder in (run_dir / "checkpoints").glob("*.partial")]
    return {"doing": at["doing"], "step": at["step"], "checkpoint": found.step, "half_written": half, "asked": activity}


def process_start(process: subprocess.Popen) -> float:
    return psutil.Process(process.pid).create_time()


def _lines(run_dir: Path) -> list[dict]:
    file = run_dir / "metrics.jsonl"
    text = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in text if line.endswith("}") and line.startswith("{")]


def differences(first: Path, second: Path) -> list[str]:
    """Metrics that are not the same number in both runs."""
    found = []
    a, b = read_metrics(first), read_metrics(second)
    if [line["step"] for line in a] != [line["step"] for line in b]:
        return [f"steps {[line['step'] for line in a]} and {[line['step'] for line in b]}"]
    for one, other in zip(a, b, strict=True):
        for name in sorted(one.keys() | other.keys()):
            if not name.startswith(VARYING) and one.get(name) != other.get(name):
                found.append(f"step {one['step']}, {name}: {one.get(name)} and {other.get(name)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    folder, overrides = arguments.folder.absolute(), arguments.overrides
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * arguments.minutes
    untouched = folder / "untouched"
    if not (untouched / "student" / "config.json").exists() and start(untouched, overrides).wait():
        raise SystemExit(f"the untouched run failed: {untouched.with_suffix('.out')}")
    record = folder / "kills.jsonl"
    kills = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    while len(kills) < arguments.kills and time.monotonic() < until:
        chance = random.Random(len(kills))
        round_ = kills[-1]["round"] if kills else 0
        activity = list(ACTIVITIES)[len(kills) % len(ACTIVITIES)]
        done = one_kill(folder / f"killed_{round_}", overrides, activity, chance)
        if done is None:  # that run is through, and is compared below; the next kill is another run's
            finished = folder / f"killed_{round_}"
            if not (finished / "student" / "config.json").exists():
                raise SystemExit(f"a resumed run failed: {finished.with_suffix('.out')}")
            kills.append({"round": round_ + 1, "doing": "", "asked": activity})
        else:
            kills.append({"round": round_, **done})
            print(f"kill {sum(bool(k['doing']) for k in kills)}: {done}", flush=True)
        with open(record, "a") as file:
            file.write(json.dumps(kills[-1]) + "\n")
    if len(kills) < arguments.kills:
        print(f"{len(kills)} of {arguments.kills} kills so far; the same command goes on")
        return 3
    last = folder / f"killed_{kills[-1]['round'] if kills else 0}"
    if last.exists() and start(last, overrides).wait():
        raise SystemExit(f"the last resumed run failed: {last.with_suffix('.out')}")
    real = [kill for kill in kills if kill["doing"]]
    by = Counter(
        next((name for name, word in ACTIVITIES.items() if kill["doing"].startswith(word)), "other") for kill in real
    )
    halves = sum(bool(kill["half_written"]) for kill in real)
    print(f"{len(real)} kills: {dict(by)}; {halves} left a half-written checkpoint, none was loaded")
    wrong = 0
    for run in sorted(folder.glob("killed_*/")):
        if (run / "metrics.jsonl").exists():
            found = differences(untouched, run)
            wrong += bool(found)
            print(f"{run.name}: {'every metric equals the untouched run' if not found else found[:5]}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
