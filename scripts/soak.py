"""A long training of the toy pair, watched: does anything grow? Prints a verdict, draws a picture.

    .venv/bin/python scripts/soak.py runs/soak --minutes 120

Every few seconds it samples, over the driver and all processes below it: resident memory, open files, threads,
processes, processor time, and the named segments of shared memory they have mapped; every two minutes the objects in
Ray's store; from metrics.jsonl the step time; and the memory of each process without files and shared memory. (The
processor time a step grows with the work, whatever else the machine does; the step time also with its load.) After a
warm-up (the first quarter) each series is cut into ten blocks and a line is fitted through the blocks' means: its slope
an hour, with a 95% confidence interval (Student's t, 8 degrees of freedom; blocks, because neighbouring samples are not
independent). "GROWS" means: the interval lies above 0 and an hour's growth is more than 2% of the mean.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import psutil
from scipy import stats

SETTINGS = [
    "recipe=quickstart",
    "trainer.total_epochs=1000000",
    "trainer.save_freq=50",
    "trainer.test_freq=200",
    "data.val_max_samples=16",
    "data.train_batch_size=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
    "trb.guided_steps=1000000",
    "trb.warmup_steps=1000000",
]
BLOCKS, TOLERANCE = 10, 0.02
NAMES = {
    "rss_mib": "resident memory, all processes, MiB",
    "largest_mib": "the largest process, MiB",
    "shared_mib": "shared memory in /dev/shm, MiB",
    "files": "open files",
    "threads": "threads",
    "processes": "processes",
    "ray_objects": "objects in Ray's store",
    "step_seconds": "seconds a step",
    "cpu_seconds": "processor seconds a step, all processes",
}


def family(process: subprocess.Popen) -> list[psutil.Process]:
    root = psutil.Process(process.pid)
    return [root, *root.children(recursive=True)]


def sample(process: subprocess.Popen, used: dict[int, float]) -> dict[str, Any]:
    """One sample of everything that is cheap; processes that end meanwhile are left out.

    `used`: process id -> its processor seconds so far, brought up to date.
    """
    rss, files, threads, seen = [], 0, 0, 0
    each: dict[int, tuple[str, float, int, int]] = {}  # process id -> program, MiB of its own, files, threads
    segments: dict[str, int] = {}
    for member in family(process):
        try:
            with member.oneshot():
                used[member.pid] = sum(member.cpu_times()[:2])
                rss.append(member.memory_info().rss / 2**20)
                counts = member.num_fds(), member.num_threads()
                files, threads, seen = files + counts[0], threads + counts[1], seen + 1
            anonymous = Path(f"/proc/{member.pid}/status").read_text().partition("RssAnon:")[2].split()[0]
            program = " ".join(member.cmdline()).partition(" ")[0].rpartition("/")[2]
            each[member.pid] = program, int(anonymous) / 1024, *counts
            for line in Path(f"/proc/{member.pid}/maps").read_text().splitlines():
                path = line[line.index("/dev/shm/") :] if "/dev/shm/" in line else ""
                if path and path not in segments and os.path.exists(path):
                    segments[path] = os.stat(path).st_size
        except (psutil.Error, OSError):
            continue
    return {
        "rss_mib": sum(rss),
        "largest_mib": max(rss, default=0.0),
        "files": files,
        "threads": threads,
        "processes": seen,
        "shared_mib": sum(segments.values()) / 2**20,
        "each": each,
    }


def ray_objects(process: subprocess.Popen) -> float | None:
    """Objects that Ray's store on this machine holds, asked of the run's own Ray by its raylet's metrics."""
    for member in family(process):
        try:
            title = " ".join(member.cmdline())
        except psutil.Error:
            continue
        if "/raylet/raylet" in title and "--gcs-address=" in title:
            address = title.split("--gcs-address=")[1].split()[0]
            code = (
                "from ray._private.internal_api import get_memory_info_reply, get_state_from_address\n"
                f"reply = get_memory_info_reply(get_state_from_address({address!r}))\n"
                "print('OBJECTS', reply.store_stats.num_local_objects)"
            )
            environment = {**os.environ, "RAY_AUTH_MODE": "token"}  # the run's Ray asks for it
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
            found = [line for line in done.stdout.splitlines() if line.startswith("OBJECTS")]
            return float(found[-1].split()[1]) if found else None
    return None


def slope(hours: np.ndarray, values: np.ndarray) -> tuple[float, float, float]:
    """Slope an hour and its 95% interval, from the means of BLOCKS blocks of equal duration."""
    edges = np.linspace(hours[0], hours[-1], BLOCKS + 1)
    place = np.clip(np.searchsorted(edges, hours, side="right") - 1, 0, BLOCKS - 1)
    used = [block for block in range(BLOCKS) if (place == block).any()]
    x = np.array([hours[place == block].mean() for block in used])
    y = np.array([values[place == block].mean() for block in used])
    fit = stats.linregress(x, y)
    half = stats.t.ppf(0.975, len(used) - 2) * fit.stderr
    return fit.slope, fit.slope - half, fit.slope + half


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def series(samples: list[dict[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> (hours since the start, values)."""
    found = {}
    for name in NAMES:
        pairs = [(one["t"] / 3600, one[name]) for one in samples if one.get(name) is not None]
        if pairs:
            found[name] = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs], dtype=float)
    return found


def of_processes(samples: list[dict[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The same of what each process has by itself, if it is there from the first quarter to the end."""
    of_each: dict[str, list[list[Any]]] = {}
    for one in samples:
        for pid, (title, *values) in one.get("each", {}).items():
            of_each.setdefault(pid, []).append([one["t"] / 3600, title, *values])
    found = {}
    for pid, rows in of_each.items():
        end = samples[-1]["t"] / 3600
        if rows[0][0] < end / 4 and rows[-1][0] > 0.95 * end:
            hours, titles, *columns = zip(*rows, strict=True)
            name = f"{titles[0]} ({pid})"
            for what, values in zip(("MiB", "files", "threads"), columns, strict=True):
                found[f"{name}, {what}"] = np.array(hours), np.array(values, dtype=float)
    return found


def verdict(words: str, hours: np.ndarray, values: np.ndarray) -> tuple[float, bool]:
    """Prints a line of the table for what is later than the first quarter; the slope, and whether it grows."""
    late = hours >= hours[-1] / 4
    fitted, low, high = slope(hours[late], values[late])
    mean = values[late].mean()
    grows = bool(low > 0 and fitted > TOLERANCE * mean)
    print(f"{words:48} {mean:9.2f} {fitted:+14.3f}   [{low:+.3f}, {high:+.3f}]   {'GROWS' if grows else 'flat'}")
    return fitted, grows


def report(folder: Path) -> int:
    """Prints the table, draws soak.png; the number of series that grow."""
    samples = read(folder)
    found = series(samples)
    growing = 0
    figure, axes = plt.subplots(3, 3, figsize=(13, 9.5), constrained_layout=True)
    print(f"{'':48} {'mean':>9} {'slope an hour':>14}   95% interval")
    for axis, (name, words) in zip(axes.flat, NAMES.items(), strict=True):
        axis.set_title(words, fontsize=10)
        if name not in found:
            axis.text(0.5, 0.5, "not sampled", ha="center", transform=axis.transAxes)
            continue
        hours, values = found[name]
        fitted, grows = verdict(words, hours, values)
        growing += grows
        start = hours[-1] / 4
        late = hours >= start
        mean = values[late].mean()
        axis.plot(60 * hours, values, ".", markersize=2, color="tab:blue", alpha=0.5)
        axis.plot(60 * hours[late], mean + fitted * (hours[late] - hours[late].mean()), color="tab:red")
        axis.axvline(60 * start, color="gray", linestyle=":")
        axis.set_ylim(0, 1.15 * max(values.max(), 1e-9))
        axis.set_xlabel("minutes", fontsize=9)
    figure.savefig(folder / "soak.png", dpi=110)
    for name, (hours, values) in sorted(of_processes(samples).items()):
        growing += verdict(name, hours, values)[1]
    steps = len(found["step_seconds"][0]) if "step_seconds" in found else 0
    print(f"{steps} steps in {60 * max(hours[-1] for hours, _ in found.values()):.0f} minutes; {folder / 'soak.png'}")
    return growing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--every", type=float, default=5, help="seconds between samples")
    parser.add_argument("--report", action="store_true", help="only evaluate what was sampled")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    folder = arguments.folder.absolute()
    if arguments.report:
        return min(report(folder), 1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run ends with its watcher
    folder.mkdir(parents=True, exist_ok=True)
    run_dir = folder / "run"
    command = [sys.executable, "-m", "verl_trb.main", *SETTINGS, "trainer.total_training_steps=1000000"]
    command += [f"trb.run_dir={run_dir}", *arguments.overrides]
    process = subprocess.Popen(command, stdout=open(folder / "screen.txt", "w"), stderr=subprocess.STDOUT)
    metrics, offset, began, asked = run_dir / "metrics.jsonl", 0, None, 0.0
    used: dict[int, float] = {}
    spent = None  # the processor seconds when the last step was seen
    try:
        with open(folder / "samples.jsonl", "w") as out:
            while process.poll() is None:
                time.sleep(arguments.every)
                if not metrics.exists():
                    continue
                began = began or time.monotonic()
                line: dict[str, Any] = sample(process, used)
                if time.monotonic() - asked > 120:
                    asked = time.monotonic()
                    line["ray_objects"] = ray_objects(process)
                with open(metrics) as file:
                    file.seek(offset)
                    whole = file.read().rpartition("\n")[0]  # the last line may be half-written
                    offset += len(f"{whole}\n".encode()) if whole else 0
                    fresh = [json.loads(text) for text in whole.splitlines()]
                now = time.monotonic() - began
                steps = sum("timing_s/step" in step for step in fresh)
                if steps:
                    total = sum(used.values())
                    line["cpu_seconds"] = (total - spent) / steps if spent is not None else None
                    spent = total
                out.write(json.dumps({"t": now, **line}) + "\n")
                for step in fresh:
                    if "timing_s/step" in step:
                        out.write(json.dumps({"t": now, "step_seconds": step["timing_s/step"]}) + "\n")
                out.flush()
                if now > 60 * arguments.minutes:
                    break
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)  # a background job of a script ignores SIGINT
            process.wait(timeout=300)
    if process.returncode not in (0, 130):
        print(f"the run failed: {folder / 'screen.txt'}")
        return 1
    return min(report(folder), 1)


if __name__ == "__main__":
    sys.exit(main())
