"""Where the next bottleneck lies: the step's model (verl_trb/planning/scaling.py), fitted on runs here, on many GPUs.

    python scripts/scaling_model.py measure FOLDER [--cache DIR]   # four runs of the quickstart, 2 cores, 5 minutes
    python scripts/scaling_model.py fit                            # the coefficients, and the model beside the runs
    python scripts/scaling_model.py predict                        # the tables and the picture of docs/scaling.md

Measured: docs/scaling.json, the medians of the runs of `measure`, on CPUs. Of it only the trainer's own process is
carried over to GPUs. Arithmetic: everything else about GPUs, from the data sheets' peaks and the assumptions below.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from verl_trb.planning.devices import GPUS
from verl_trb.planning.roofline import pass_seconds, tokens_per_block, training_flops
from verl_trb.planning.scaling import Costs, Step, fit, mean_step, response_lengths, step
from verl_trb.planning.shapes import KNOWN
from verl_trb.run_folder import exported

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "docs" / "scaling.json"
PICTURE = ROOT / "docs" / "pictures" / "scaling.svg"

# Runs of `measure`: devices and sequences a step. The last one is not fitted: it is what the model is tested on.
RUNS = ((1, 24), (1, 96), (2, 48), (2, 96))
DATA_STEPS, GUIDED_STEPS = 4, 5  # with the data's responses, so without an engine; then with rollouts

# Assumptions for GPUs.
H100 = GPUS["H100-80GB"]
STUDENT, TEACHER = KNOWN["Qwen/Qwen3-1.7B"], KNOWN["Qwen/Qwen3-8B"]
GAMMA, TV = 4, 0.05  # drafts a block; total variation between student and policy
NVLINK, NETWORK = 450e9, 50e9  # bytes/s of a GPU to the others of its node, and beyond it (400 Gbit/s each)
NODE = 8
UTILIZATION = 0.4  # of the peak FLOPs in the update
LENGTHS = {"median": 2500.0, "sigma": 0.6, "limit": 7168}  # of responses; the limit is the paper's
PROMPT, CONTEXT = 150.0, 1700  # tokens of a prompt; of a KV cache that a block reads, on average
MICRO_BATCH = 16_384  # tokens
BATCH = 256  # sequences of the paper's step
LOOPS = 8  # agent-loop workers, verl's default
SAMPLES = 40  # simulated steps each

# Of the model's coefficients, those of processes on the CPU.
PROCESSES = ("loop_fixed", "loop_sequence", "controller_fixed", "controller_sequence")


# ------------------------------------------------------------------ measured


def measure(folder: Path, cache: str) -> None:
    """Runs RUNS one after the other, but for those that are in the folder already; writes their medians to MEASURED."""
    found = []
    for devices, batch in RUNS:
        run = folder / f"{devices}x{batch}"
        settings = {
            "trainer.n_gpus_per_node": devices,
            "data.train_batch_size": batch,
            "actor_rollout_ref.actor.ppo_mini_batch_size": batch,
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 24,
            "actor_rollout_ref.rollout.max_num_seqs": 128,
            "trainer.total_training_steps": DATA_STEPS + GUIDED_STEPS,
            "trainer.test_freq": -1,
            "trainer.save_freq": -1,
            "trainer.val_before_train": "false",
            "trainer.resume_mode": "disable",
            "trb.data_response": "reward_model.ground_truth",
            "trb.data_share": f"[[{DATA_STEPS},1],[{DATA_STEPS + 1},0]]",
            "trb.run_dir": run,
            **({"trb.cache_dir": cache} if cache else {}),
        }
        if not exported(run):
            command = [sys.executable, "-m", "verl_trb.main", "recipe=quickstart"]
            subprocess.run([*command, *(f"{key}={value}" for key, value in settings.items())], check=True)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found += [medians(devices, batch, kind, chosen) for kind, chosen in split(lines).items()]
    MEASURED.write_text(json.dumps(found, indent=1) + "\n")


def split(lines: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Steps with the data's responses and with rollouts, without the first of each, which warms up."""
    steps = {line["step"]: line for line in lines if line["step"] > 0}
    last = DATA_STEPS + GUIDED_STEPS
    return {
        "data": [steps[k] for k in range(2, DATA_STEPS + 1)],
        "guided": [steps[k] for k in range(DATA_STEPS + 2, last + 1)],
    }


def medians(devices: int, batch: int, kind: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    def median(name: str) -> float:
        return round(statistics.median(line[name] for line in lines), 4)

    parts = {name: median(f"timing_s/{name}") for name in ("step", "gen", "update_actor", "update_weights")}
    rest = statistics.median(
        line["timing_s/step"] - sum(line[f"timing_s/{name}"] for name in ("gen", "update_actor", "update_weights"))
        for line in lines
    )
    return {
        "devices": devices,
        "sequences": batch,
        "kind": kind,
        **parts,
        "rest": round(rest, 4),
        "response": median("response_length/mean"),
        "prompt": median("prompt_length/mean"),
        **({"tokens_per_block": median("trb/tokens_per_teacher_pass")} if kind == "guided" else {}),
    }


def fitted(found: list[dict[str, Any]]) -> dict[str, float]:
    """The coefficients, from every run but the last of RUNS."""
    known = [row for row in found if (row["devices"], row["sequences"]) != RUNS[-1]]
    data = [row for row in known if row["kind"] == "data"]
    guided = [row for row in known if row["kind"] == "guided"]
    result: dict[str, float] = {}
    for names, part in (
        (("loop_fixed", "loop_sequence"), "gen"),
        (("controller_fixed", "controller_sequence"), "rest"),
    ):
        coefficients = fit([[1, row["sequences"]] for row in data], [row[part] for row in data])
        result |= dict(zip(names, coefficients, strict=True))
    terms, seconds = [], []
    for row in guided:
        blocks = row["response"] / row["tokens_per_block"]
        terms.append([blocks, blocks * row["sequences"] / row["devices"]])
        seconds.append(max(1e-3, row["gen"] - result["loop_fixed"] - result["loop_sequence"] * row["sequences"]))
    result |= dict(zip(("block", "block_sequence"), fit(terms, seconds), strict=True))
    tokens = [row["sequences"] * (row["response"] + row["prompt"]) / row["devices"] for row in known]
    several = [float(row["devices"] > 1) for row in known]
    rows = [[1, token, more] for token, more in zip(tokens, several, strict=True)]
    update = fit(rows, [row["update_actor"] for row in known])
    result |= dict(zip(("update_fixed", "update_token", "gather"), update, strict=True))
    for devices in (1, 2):
        result[f"sync_{devices}"] = statistics.median(
            row["update_weights"] for row in known if row["devices"] == devices
        )
    return result


def cpu_costs(c: dict[str, float], tokens: float) -> Costs:
    return Costs(
        block=lambda n: c["block"] + c["block_sequence"] * n,
        tokens_per_block=tokens,
        update_fixed=c["update_fixed"],
        update_token=c["update_token"],
        gather=lambda devices: c["gather"] * (devices > 1),
        hides_gather=False,
        sync=lambda devices: c[f"sync_{devices}"],
        loops=1,
        hides_loops=False,
        **{name: c[name] for name in PROCESSES},
    )


def compare(found: list[dict[str, Any]]) -> None:
    """Prints the coefficients, and measured against modelled steps."""
    c = fitted(found)
    for name, value in c.items():
        print(f"{name:20} {1e3 * value:10.3f} ms")
    print("\ndevices sequences   measured   model   ratio   of it rollout, loops, update, sync, controller")
    for row in (row for row in found if row["kind"] == "guided"):
        lengths = [round(row["response"])] * row["sequences"]
        got = step(cpu_costs(c, row["tokens_per_block"]), lengths, row["devices"], row["prompt"], 128)
        parts = (got.rollout + got.waiting, got.loops, got.update, got.sync, got.controller)
        new = "  (not fitted)" if (row["devices"], row["sequences"]) == RUNS[-1] else ""
        numbers = f"{row['step']:10.2f} {got.total:7.2f} {got.total / row['step']:7.2f}"
        print(f"{row['devices']:7} {row['sequences']:9} {numbers}   {', '.join(f'{part:.2f}' for part in parts)}{new}")


# ------------------------------------------------------------------ arithmetic


def gpu_costs(c: dict[str, float], tokens_of_a_device: float) -> Costs:
    """Of Qwen3-1.7B learning from Qwen3-8B on H100s; the trainer's process and the agent loops are what was measured
    here, each on a core of its own.
    """
    micro_batches = max(1.0, tokens_of_a_device / MICRO_BATCH)
    # bfloat16 student gathered forward and backward, teacher forward; float32 gradients scattered once.
    moved = micro_batches * (2 * 2 * STUDENT.read + 2 * TEACHER.read) + 4 * STUDENT.read

    def seconds(size: float, devices: int) -> float:
        return 0.0 if devices == 1 else size * (1 - 1 / devices) / (NVLINK if devices <= NODE else NETWORK)

    def block(n: int) -> float:
        drafting = GAMMA * pass_seconds(STUDENT, H100, n, CONTEXT, 1)
        return drafting + pass_seconds(TEACHER, H100, n, CONTEXT, GAMMA)

    return Costs(
        block=block,
        tokens_per_block=tokens_per_block(GAMMA, TV),
        update_fixed=0.0,
        update_token=training_flops(STUDENT, TEACHER, checkpointing=True) / (H100.flops * UTILIZATION),
        gather=lambda devices: seconds(moved, devices),
        hides_gather=True,
        sync=lambda devices: seconds(2 * STUDENT.read, devices),
        loops=LOOPS,
        hides_loops=True,
        **{name: c[name] for name in PROCESSES},
    )


def predictions(c: dict[str, float]) -> dict[str, dict[int, Step]]:
    """Steps by the number of GPUs: the paper's batch on more and more of them, and 32 sequences a GPU."""
    result: dict[str, dict[int, Step]] = {"256 sequences": {}, "32 sequences a GPU": {}}
    for name in result:
        for devices in (8, 16, 32, 64, 128, 256, 512):
            sequences = BATCH if name == "256 sequences" else 32 * devices
            if sequences < devices:
                continue
            rng = np.random.default_rng(0)
            steps = []
            for _ in range(SAMPLES if sequences < 4096 else 8):
                lengths = response_lengths(sequences, rng=rng, **LENGTHS)  # type: ignore[arg-type]
                tokens = (sum(lengths) + PROMPT * sequences) / devices
                costs = gpu_costs(c, tokens)
                steps.append(step(costs, lengths, devices, PROMPT))
            result[name][devices] = mean_step(steps)
    return result


def predict(found: list[dict[str, Any]]) -> None:
    """Prints the tables and draws the picture."""
    results = predictions(fitted(found))
    for name, by_devices in results.items():
        print(f"\n{name}\n GPUs   rollout  waiting    loops   update     sync  controller   step   efficiency")
        first = next(iter(by_devices))
        scale = by_devices[first].total * (first if name == "256 sequences" else 1)
        for devices, s in by_devices.items():
            ideal = scale / (devices if name == "256 sequences" else 1)
            parts = " ".join(f"{part:8.2f}" for part in (s.rollout, s.waiting, s.loops, s.update, s.sync))
            print(f"{devices:5} {parts} {s.controller:11.2f} {s.total:6.1f} {ideal / s.total:12.0%}")
    draw(results)


def draw(results: dict[str, dict[int, Step]]) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "scaling"
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    parts = {
        "rollout": "#3b7dd8",
        "waiting": "#a9c9f2",
        "loops": "#8d6bb8",
        "update": "#e08b3a",
        "sync": "#7a7a7a",
        "controller": "#b5443c",
    }
    names = {
        "waiting": "waiting for the slowest engine",
        "loops": "agent loops",
        "sync": "weight sync",
        "controller": "trainer's process",
    }
    for axis, (name, by_devices) in zip(axes, results.items(), strict=True):
        places, bottom = np.arange(len(by_devices)), np.zeros(len(by_devices))
        for part, color in parts.items():
            height = np.array([getattr(s, part) for s in by_devices.values()])
            axis.bar(places, height, 0.72, bottom, color=color, label=names.get(part, part))
            bottom += height
        axis.set_xticks(places, [str(devices) for devices in by_devices])
        axis.set(title=name, xlabel="GPUs", ylabel="seconds a step")
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False, fontsize=9, loc="upper left")
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("folder", type=Path)
    measuring.add_argument("--cache", default="")
    commands.add_parser("fit")
    commands.add_parser("predict")
    options = parser.parse_args()
    if options.command == "measure":
        return measure(options.folder.absolute(), options.cache)
    if not MEASURED.exists():
        sys.exit(f"error: there is no {MEASURED}; make it with: python scripts/scaling_model.py measure FOLDER")
    {"fit": compare, "predict": predict}[options.command](json.loads(MEASURED.read_text()))


if __name__ == "__main__":
    main()
