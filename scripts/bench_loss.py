"""Memory and time of the exact reverse KL through both output layers, against the naive one; docs/performance.md.

    python scripts/bench_loss.py                  # 4,096 tokens x 151,936, float32; needs 14 GB for the naive side
    python scripts/bench_loss.py --tokens 2048    # needs 7 GB

Each side runs in its own process, which reports the peak of its resident memory above its inputs and the median
time of a forward and backward pass; the first call, in fresh memory, is not timed. The gradients of both are
compared with the naive ones in float64, on 256 tokens. Exits with 1 where a target is missed. Leaves out CUDA.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from verl_trb.chunked_loss import loss_from_layers

GIB = 2**30


def naive(student_ND: Tensor, student_VD: Tensor, teacher_NE: Tensor, teacher_VE: Tensor) -> Tensor:
    """The mean reverse KL the way one writes it down; only the teacher's log-probabilities are dropped early."""
    logp_NV = (student_ND @ student_VD.T).log_softmax(-1)
    with torch.no_grad():
        logp_teacher_NV = (teacher_NE @ teacher_VE.T).log_softmax(-1)
    gap_NV = logp_NV - logp_teacher_NV
    del logp_teacher_NV
    return (logp_NV.exp() * gap_NV).sum(-1).mean()


def ours(student_ND: Tensor, student_VD: Tensor, teacher_NE: Tensor, teacher_VE: Tensor) -> Tensor:
    return loss_from_layers(student_ND, student_VD, teacher_NE, teacher_VE).loss_N.mean()


SIDES = {"naive": naive, "ours": ours}


def inputs(options: argparse.Namespace, tokens: int) -> list[Tensor]:
    """Hidden states and output layers of student and teacher; logits have a standard deviation of about 3, as
    language models' have."""
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for hidden in (options.student_hidden, options.teacher_hidden):
        tensors.append(torch.randn(tokens, hidden, generator=generator))
        tensors.append(torch.randn(options.size, hidden, generator=generator).mul_(3 / hidden**0.5))
    return tensors


def gradients(side: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Of the student's hidden states and output layer, in float64."""
    leaves = [x.clone().requires_grad_() for x in tensors[:2]]
    side(*leaves, *tensors[2:]).backward()
    return [leaf.grad.double() for leaf in leaves if leaf.grad is not None]


def gradient_errors(options: argparse.Namespace) -> dict[str, float]:
    """The larger relative error of both gradients of each side, against the naive side in float64."""
    tensors = inputs(options, 256)
    exact = gradients(naive, [x.double() for x in tensors])
    return {
        name: max(float((a - b).norm() / b.norm()) for a, b in zip(gradients(side, tensors), exact, strict=True))
        for name, side in SIDES.items()
    }


def memory(field: str) -> int:
    """A field of /proc/self/status (VmRSS, VmHWM) in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def run_side(options: argparse.Namespace) -> None:
    """In the child: measure one side, print one line of JSON."""
    tensors = inputs(options, options.tokens)
    student_ND, student_VD = (x.requires_grad_() for x in tensors[:2])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before, times, value = memory("VmRSS"), [], 0.0
    for _ in range(1 + options.repeats):
        student_ND.grad = student_VD.grad = None
        start = time.perf_counter()
        loss = SIDES[options.side](*tensors)
        loss.backward()
        times.append(time.perf_counter() - start)
        value = float(loss.detach())
        del loss
    peak = memory("VmHWM") - before
    print(json.dumps({"peak": peak, "seconds": statistics.median(times[1:]), "loss": value}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--size", type=int, default=151_936)
    parser.add_argument("--student-hidden", type=int, default=128)
    parser.add_argument("--teacher-hidden", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return run_side(options)

    shape = (
        f"{options.tokens:,} tokens x {options.size:,}, hidden {options.student_hidden} and {options.teacher_hidden}"
    )
    print(f"{shape}, float32, {torch.get_num_threads()} thread(s)")
    results = {}
    for side in SIDES:
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if child.returncode:
            sys.exit(f"the {side} side ended with status {child.returncode} (-9: out of memory?)")
        results[side] = json.loads(child.stdout)
        peak, seconds = results[side]["peak"] / GIB, results[side]["seconds"]
        print(f"{side:>6}: peak extra memory {peak:6.2f} GiB   {seconds:6.2f} s   loss {results[side]['loss']:.6f}")
    errors = gradient_errors(options)
    ratio = results["ours"]["seconds"] / results["naive"]["seconds"]
    print(f"time {ratio:.2f}x naive; relative gradient errors: ours {errors['ours']:.1e}, naive {errors['naive']:.1e}")
    met = results["ours"]["peak"] <= GIB and ratio <= 1.3 and errors["ours"] <= 1e-5
    print("all targets met" if met else "missed: at most 1 GiB, 1.3x the naive time, gradients to 1e-5")
    sys.exit(not met)


if __name__ == "__main__":
    main()
