"""Times the Triton solver on a GPU against torch's, and prints the memory bandwidth it reaches.

    python scripts/bench_kernel.py                                             # on a GPU
    TRITON_INTERPRET=1 python scripts/bench_kernel.py --rows 4 --size 5000     # on a CPU: that it runs, no figures

Both start from the student's log-probabilities and the teacher's raw logits in bfloat16: torch canonicalizes,
normalizes, then solves. Prints medians, the ratio, and how many of the bytes an ideal kernel would read (both models
once a sweep) it reads a second. Has not been run on a GPU yet: see docs/gpu.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from bench_solver import EPSILONS, synthetic_pair

from verl_trb.kernels.trust_region_triton import blend_logits
from verl_trb.trust_region import blend
from verl_trb.vocabulary import SharedVocabulary, canonicalize

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Median of `repeats` calls after two that compile and warm up."""
    times = []
    for _ in range(2 + repeats):
        start = time.perf_counter()
        call()
        if not INTERPRETED:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--size", type=int, default=151_936)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    device = "cpu" if INTERPRETED else "cuda"
    size, rows = options.size, options.rows
    student_NV, teacher_NV = (x.to(device) for x in synthetic_pair(rows, size))
    teacher_NV = teacher_NV.bfloat16()
    eos, other = size - 1, size - 2
    vocabulary = SharedVocabulary(size, student_eos=eos, teacher_eos=other, masked=(other,), marker=other)
    student_NV = canonicalize(student_NV, vocabulary, "student").log_softmax(-1)
    print(f"{rows} rows x {size:,} on {torch.cuda.get_device_name() if device == 'cuda' else 'the interpreter'}")
    print(f"{'epsilon':>8} {'torch':>10} {'kernel':>10} {'ratio':>7} {'passes':>7} {'GB/s':>7} {'beta differs':>13}")
    for epsilon in EPSILONS:
        epsilon_N = torch.full((rows,), epsilon, device=device)

        def by_torch(epsilon_N=epsilon_N):
            logp_teacher_NV = canonicalize(teacher_NV.float(), vocabulary, "teacher").log_softmax(-1)
            return blend(student_NV, logp_teacher_NV, epsilon_N)

        def by_kernel(epsilon_N=epsilon_N):
            return blend_logits(student_NV, teacher_NV, epsilon_N, vocabulary=vocabulary)

        blended, passes_N = by_kernel()
        passes = float(passes_N.float().mean())
        theirs, ours = milliseconds(by_torch, options.repeats), milliseconds(by_kernel, options.repeats)
        # One sweep over the teacher for its normalizer, one over both a pass, one over both to write log mu.
        moved = teacher_NV.nbytes + (passes + 1) * (student_NV.nbytes + teacher_NV.nbytes) + student_NV.nbytes
        differs = float((blended.beta - by_torch().beta).abs().max())
        print(
            f"{epsilon:8g} {theirs:8.2f}ms {ours:8.2f}ms {theirs / ours:6.1f}x {passes:7.2f} {moved / ours / 1e6:7.0f}"
            f" {differs:13.1e}"
        )


if __name__ == "__main__":
    main()
