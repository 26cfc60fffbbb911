"""Memory and time of the exact reverse KL through both output layers, against the naive one; docs/performance.md.

    python scripts/bench_loss.py                  # 4,096 tokens x 151,936, float32; needs 14 GB for the naive side
    python scripts/bench_loss.py --tokens 2048    # needs 7 GB

Each side runs in its own process, which reports the peak of its resident memory above its inputs and the median
time of a forward and backward pass; the first call, in fresh memory, is not timed. The gradients are compared
here. Exits with 1 where a target is missed. Leaves out CUDA.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from verl_trb.divergences import linear_reverse_kl

GIB = 2**30
SIDES = ("naive", "ours")


def naive(student_ND: Tensor, student_VD: Tensor, teacher_NE: Tensor, teacher_VE: Tensor) -> Tensor:
    """The mean reverse KL the way one writes it down; only the teacher's log-probabilities are dropped early."""
    logp_NV = (student_ND @ student_VD.T).log_softmax(-1)
    with torch.no_grad():
        logp_teacher_NV = (teacher_NE @ teacher_VE.T).log_softmax(-1)
    gap_NV = logp_NV - logp_teacher_NV
    del logp_teacher_NV
    return (logp_NV.exp() * gap_NV).sum(-1).mean()


def ours(student_ND: Tensor, student_VD: Tensor, teacher_NE: Tensor, teacher_VE: Tensor) -> Tensor:
    return linear_reverse_kl(student_ND, student_VD, teacher_NE, teacher_VE).loss_N.mean()


def memory(field: str) -> int:
    """A field of /proc/self/status (VmRSS, VmHWM) in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def run_side(options: argparse.Namespace) -> None:
    """In the child: measure one side, save its gradients, print one line of JSON."""
    generator = torch.Generator().manual_seed(0)
    tokens, size, student, teacher = options.tokens, options.size, options.student_hidden, options.teacher_hidden
    # Logits with a standard deviation of about 3, as language models have.
    hidden_ND = torch.randn(tokens, student, generator=generator).requires_grad_()
    weight_VD = torch.randn(size, student, generator=generator).mul_(3 / student**0.5).requires_grad_()
    hidden_NE = torch.randn(tokens, teacher, generator=generator)
    weight_VE = torch.randn(size, teacher, generator=generator).mul_(3 / teacher**0.5)
    loss_of = {"naive": naive, "ours": ours}[options.side]

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before, times, value = memory("VmRSS"), [], 0.0
    for _ in range(1 + options.repeats):
        hidden_ND.grad = weight_VD.grad = None
        start = time.perf_counter()
        loss = loss_of(hidden_ND, weight_VD, hidden_NE, weight_VE)
        loss.backward()
        times.append(time.perf_counter() - start)
        value = float(loss.detach())
        del loss
    peak = memory("VmHWM") - before
    torch.save([hidden_ND.grad, weight_VD.grad], options.gradients)
    print(json.dumps({"peak": peak, "seconds": statistics.median(times[1:]), "loss": value}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--size", type=int, default=151_936)
    parser.add_argument("--student-hidden", type=int, default=128)
    parser.add_argument("--teacher-hidden", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--gradients", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return run_side(options)

    shape = (
        f"{options.tokens:,} tokens x {options.size:,}, hidden {options.student_hidden} and {options.teacher_hidden}"
    )
    print(f"{shape}, float32, {torch.get_num_threads()} thread(s)")
    results, gradients = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for side in SIDES:
            path = Path(folder) / side
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--gradients", str(path)]
            child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if child.returncode:
                sys.exit(f"the {side} side ended with status {child.returncode} (-9: out of memory?)")
            results[side], gradients[side] = json.loads(child.stdout), torch.load(path)
            peak, seconds = results[side]["peak"] / GIB, results[side]["seconds"]
            print(f"{side:>6}: peak extra memory {peak:6.2f} GiB   {seconds:6.2f} s   loss {results[side]['loss']:.6f}")
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(gradients["naive"], gradients["ours"], strict=True)]
    ratio = results["ours"]["seconds"] / results["naive"]["seconds"]
    print(f"time {ratio:.2f}x naive; gradients differ by {errors[0]:.1e} (hidden), {errors[1]:.1e} (weight), relative")
    met = results["ours"]["peak"] <= GIB and ratio <= 1.3 and max(errors) <= 1e-5
    print("all targets met" if met else "missed: at most 1 GiB, 1.3x the naive time, gradients to 1e-5")
    sys.exit(not met)


if __name__ == "__main__":
    main()
