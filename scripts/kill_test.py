"""Kills a run at random moments, resumes it each time, and compares what it became with a run nobody touched.

    .venv/bin/python scripts/kill_test.py runs/kill_test --kills 30

Both are the quickstart's toy pair under trb.deterministic=true with a checkpoint every step, in the folders
FOLDER/untouched and FOLDER/killed_N. A kill is a SIGKILL of the driver and all of its processes, at a random moment of
an activity that status.json names: rollouts, training, checkpoint, weights, in turn. After each kill: the last complete
checkpoint is the one the next start resumes from, no half-written folder passes for complete, and the next start names
it. In the end every metric of every step, but times and memory, must be the same number as the untouched run's. The
folder keeps count, so the same command goes on where it was stopped; --kills N is how many are wanted in all,
--minutes M stops after about M minutes.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil

from verl_trb import session
from verl_trb.checkpoints import find
from verl_trb.report import read_metrics
from verl_trb.run_folder import exported

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
    "trb.sample_prompts=0",
    "data.val_max_samples=4",
    "data.train_batch_size=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
]
# What a rerun does not repeat: clocks, memory, and how often the driver started again.
VARYING = ("timing", "perf/", "actor/perf/", "trb/restarts")


def start(run_dir: Path, overrides: list[str]) -> psutil.Process:
    """The run in a fork of this process; its workers are forks of the session's template."""
    arguments = [*SETTINGS, f"trb.run_dir={run_dir}", *overrides]
    return psutil.Process(session.start(arguments, run_dir.with_suffix(".out")))


def kill(standing: set[psutil.Process]) -> None:
    """SIGKILL for the driver and all of the run's processes: everything below this process that is not `standing`."""
    while family := set(psutil.Process().children(recursive=True)) - standing:
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGKILL)
        psutil.wait_procs(family, timeout=30)


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Ends a run that is under way when this process is interrupted."""
    standing = set(psutil.Process().children(recursive=True))
    try:
        yield
    finally:
        kill(standing)


def status(run_dir: Path) -> dict:
    try:
        return json.loads((run_dir / "status.json").read_text())
    except (OSError, ValueError):
        return {}


def one_kill(run_dir: Path, overrides: list[str], activity: str, chance: random.Random) -> dict | None:
    """Starts or resumes the run and kills it in `activity`, some steps later; None if the run ended before."""
    before = find(run_dir / "checkpoints")
    expected = before.step
    lines_before = _lines(run_dir)
    standing = set(psutil.Process().children(recursive=True))
    process, steps = start(run_dir, overrides), chance.choice((1, 1, 2))
    began = time.time()
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        now = status(run_dir)
        fresh = now.get("since", 0) > began
        if fresh and now["doing"].startswith(ACTIVITIES[activity]) and now["step"] >= expected + steps:
            time.sleep(chance.expovariate(1 / 0.05))
            break
        if time.time() > began + 400:
            kill(standing)
            raise SystemExit(f"no progress in 400 s: {now}; see {run_dir.with_suffix('.out')}")
        time.sleep(0.005)
    else:
        if process.wait():
            raise SystemExit(f"a resumed run failed: {run_dir.with_suffix('.out')}")
        return None
    at = status(run_dir)
    kill(standing)
    # Behind the line of the checkpoint's own step, which a start writes where the kill came before the run did.
    resumed = [line["step"] for line in _lines(run_dir)[len(lines_before) :] if line["step"] != expected]
    if resumed and resumed[0] != expected + 1:
        raise SystemExit(f"the run went on at step {resumed[0]}, but its checkpoint was of step {expected}")
    said = " ".join(run_dir.with_suffix(".out").read_text().split())
    if unsaid := [sentence for sentence in before.unusable if sentence not in said]:
        raise SystemExit(f"the start did not report: {unsaid}")
    found = find(run_dir / "checkpoints")
    half = [folder.name for folder in (run_dir / "checkpoints").glob("*.partial")]
    return {"doing": at["doing"], "step": at["step"], "checkpoint": found.step, "half_written": half, "asked": activity}


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


def killed_runs(folder: Path, overrides: list[str], wanted: int, until: float) -> list[dict]:
    """Kills until there are `wanted` in the folder's record, which is returned; one run after the other."""
    record = folder / "kills.jsonl"
    kills = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    while sum(bool(kill["doing"]) for kill in kills) < wanted and time.monotonic() < until:
        round_ = kills[-1]["round"] if kills else 0
        activity = list(ACTIVITIES)[len(kills) % len(ACTIVITIES)]
        done = one_kill(folder / f"killed_{round_}", overrides, activity, random.Random(len(kills)))
        if done is None:  # that run is through, and is compared below; the next kill is another run's
            kills.append({"round": round_ + 1, "doing": "", "asked": activity})
        else:
            kills.append({"round": round_, **done})
            print(f"kill {sum(bool(kill['doing']) for kill in kills)}: {done}", flush=True)
        with open(record, "a") as file:
            file.write(json.dumps(kills[-1]) + "\n")
    return kills


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
    # Ray's workers step back behind everything else by default, so that a busy machine starts no run in an hour.
    os.environ.setdefault("RAY_worker_niceness", "0")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with session.session([*SETTINGS, *overrides], folder / "template.log"), nothing_left():
        if not exported(untouched) and start(untouched, overrides).wait():
            raise SystemExit(f"the untouched run failed: {untouched.with_suffix('.out')}")
        kills = killed_runs(folder, overrides, arguments.kills, until)
        real = [kill for kill in kills if kill["doing"]]
        if len(real) < arguments.kills:
            print(f"{len(real)} of {arguments.kills} kills so far; the same command goes on")
            return 3
        last = folder / f"killed_{kills[-1]['round'] if kills else 0}"
        if last.exists() and not exported(last) and start(last, overrides).wait():
            raise SystemExit(f"the last resumed run failed: {last.with_suffix('.out')}")
    by = Counter(
        next((name for name, word in ACTIVITIES.items() if kill["doing"].startswith(word)), "other") for kill in real
    )
    halves = sum(bool(kill["half_written"]) for kill in real)
    print(f"{len(real)} kills: {dict(by)}; {halves} left a half-written checkpoint, none was loaded")
    wrong = 0
    for run in filter(exported, sorted(folder.glob("killed_*/"))):
        found = differences(untouched, run)
        wrong += bool(found)
        print(f"{run.name}: {'every metric equals the untouched run' if not found else found[:5]}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
