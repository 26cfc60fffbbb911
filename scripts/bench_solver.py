"""Times the solver against bisection, at the vocabulary of Qwen3; docs/performance.md says what to expect.

    python scripts/bench_solver.py                # 64 rows x 151,936, epsilon from 0.001 to 1
    python scripts/bench_solver.py --rows 16 --repeats 3

Both sides run in one process, in turns, on the same log-probabilities: those of a synthetic pair with a few
likely tokens a row, as language models have. "Careful" bisection has scratch memory and the solver's own way to
exponentiate; it has no target. Prints medians, ratios, passes, the KL that was reached (in float64)
and the memory traffic of one call. Exits with 1 where a target is missed. Leaves out CUDA: see scripts/gpu_check.sh.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from verl_trb.bits import LOG2_E
from verl_trb.trust_region import blend, solve_beta

EPSILONS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
PAGE = 2**16
CACHE_FILE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


def synthetic_pair(rows: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Log-probabilities [rows, size] of a student and a teacher, from nearly equal to far apart, float32."""
    generator = torch.Generator().manual_seed(seed)
    student_NV = torch.randn(rows, size, generator=generator).mul_(2)
    student_NV[:, :20] += torch.linspace(0, 14, rows)[:, None] * torch.rand(rows, 20, generator=generator)
    gap_N1 = torch.linspace(0.3, 3.0, rows)[torch.randperm(rows, generator=generator), None]
    teacher_NV = student_NV + gap_N1 * torch.randn(rows, size, generator=generator)
    return student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)


def bisection(logp_student_NV: Tensor, logp_teacher_NV: Tensor, epsilon: float, steps: int = 30) -> Tensor:
    """log mu by plain bisection on beta, the way one writes it down."""
    ratio_NV = logp_teacher_NV - logp_student_NV
    low_N1, high_N1 = torch.zeros_like(ratio_NV[:, :1]), torch.ones_like(ratio_NV[:, :1])
    for _ in range(steps):
        beta_N1 = (low_N1 + high_N1) / 2
        log_mu_NV = (logp_student_NV + beta_N1 * ratio_NV).log_softmax(-1)
        kl_N1 = (log_mu_NV.exp() * (log_mu_NV - logp_student_NV)).sum(-1, keepdim=True)
        low_N1, high_N1 = (
            torch.where(kl_N1 <= epsilon, beta_N1, low_N1),
            torch.where(kl_N1 <= epsilon, high_N1, beta_N1),
        )
    return (logp_student_NV + low_N1 * ratio_NV).log_softmax(-1)


def careful_bisection(logp_student_NV: Tensor, logp_teacher_NV: Tensor, epsilon: float, steps: int = 30) -> Tensor:
    """The same with a scratch tensor, exp2 instead of exp, and KL from the mean of the ratio."""
    ratio_NV, bits_NV = logp_teacher_NV - logp_student_NV, logp_student_NV * LOG2_E
    w_NV = torch.empty_like(ratio_NV)
    low_N1, high_N1 = torch.zeros_like(ratio_NV[:, :1]), torch.ones_like(ratio_NV[:, :1])
    for _ in range(steps):
        beta_N1 = (low_N1 + high_N1) / 2
        z_N1 = torch.addcmul(bits_NV, LOG2_E * beta_N1, ratio_NV, out=w_NV).exp2_().sum(-1, keepdim=True)
        kl_N1 = beta_N1 * w_NV.mul_(ratio_NV).sum(-1, keepdim=True) / z_N1 - z_N1.log()
        low_N1, high_N1 = (
            torch.where(kl_N1 <= epsilon, beta_N1, low_N1),
            torch.where(kl_N1 <= epsilon, high_N1, beta_N1),
        )
    return torch.addcmul(logp_student_NV, low_N1, ratio_NV, out=w_NV).log_softmax(-1)


class Traffic(TorchDispatchMode):
    """Bytes that torch's operators touch, and those that cross a least-recently-used cache to main memory.

    Every operator reads its tensor arguments and writes its results in whole; a page that is not in the cache is
    fetched, a written one is also carried back when it leaves.
    """

    def __init__(self, cache_bytes: int) -> None:
        super().__init__()
        self.pages: OrderedDict[int, bool] = OrderedDict()  # page -> written
        self.capacity = cache_bytes // PAGE
        self.touched = self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Views and bare allocations touch nothing.
        if not (func.is_view or "empty" in func.name()):
            results = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
            outputs = {x.data_ptr() for x in results}
            reads = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.data_ptr() not in outputs]
            for tensors, written in ((reads, False), (results, True)):
                for tensor in tensors:
                    self._touch(tensor, written)
        return result

    def _touch(self, tensor: Tensor, written: bool) -> None:
        if tensor.numel() == 0:
            return
        extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        size = extent * tensor.element_size()
        self.touched += size
        if size < PAGE:
            return
        for page in range(tensor.data_ptr() // PAGE, (tensor.data_ptr() + size - 1) // PAGE + 1):
            before = self.pages.pop(page, None)
            self.moved += PAGE if before is None else 0
            self.pages[page] = written or bool(before)
            if len(self.pages) > self.capacity:
                _, dirty = self.pages.popitem(last=False)
                self.moved += PAGE if dirty else 0


def seconds(call: Callable[..., object], *arguments: Any) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def cache_bytes() -> int:
    """Half the level-3 cache of this machine (the rest is for neighbours), 16 MiB if unknown."""
    return int(CACHE_FILE.read_text().strip().rstrip("K")) * 1024 // 2 if CACHE_FILE.exists() else 2**24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--size", type=int, default=151_936)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rows, size = options.rows, options.size
    logp_student_NV, logp_teacher_NV = synthetic_pair(rows, size)
    print(f"{rows} rows x {size:,}, float32, {torch.get_num_threads()} thread(s); medians of {options.repeats}")
    print(f"{'epsilon':>8} {'bisection':>10} {'careful':>9} {'blend':>8} {'ratios':>13} {'passes':>7} {'max KL':>10}")

    missed, all_passes = [], []
    for epsilon in EPSILONS:
        contenders = (bisection, careful_bisection, blend)
        turns = [
            [seconds(solve, logp_student_NV, logp_teacher_NV, epsilon) for solve in contenders]
            for _ in range(options.repeats)
        ]
        plain, careful, ours = (statistics.median(column) for column in zip(*turns, strict=True))
        budget_N = torch.full((rows,), epsilon)
        passes = float(solve_beta(logp_student_NV, logp_teacher_NV, budget_N)[2].passes_N.mean())
        all_passes.append(passes)
        kl_max = max(
            float((log_mu_V.exp() * (log_mu_V - logp_V)).sum() + logp_V.logsumexp(-1))
            for log_mu_V, logp_V in (
                (a.double(), b.double())
                for a, b in zip(blend(logp_student_NV, logp_teacher_NV, epsilon).log_mu, logp_student_NV, strict=True)
            )
        )
        print(
            f"{epsilon:8g} {plain:9.3f}s {careful:8.3f}s {ours:7.3f}s {plain / ours:5.1f}x {careful / ours:5.1f}x"
            f" {passes:7.2f} {kl_max:10.6f}"
        )
        if plain / ours < 5:
            missed.append(f"epsilon {epsilon}: {plain / ours:.1f}x bisection, not 5x")
        if kl_max > epsilon:
            missed.append(f"epsilon {epsilon}: KL {kl_max}")
    mean_passes = statistics.mean(all_passes)
    print(f"passes on average: {mean_passes:.2f} (a pass sweeps the vocabulary once)")
    if mean_passes > 3:
        missed.append(f"{mean_passes:.2f} passes, not 3")

    with Traffic(cache_bytes()) as traffic:
        blend(logp_student_NV, logp_teacher_NV, 0.02)
    passes = float(solve_beta(logp_student_NV, logp_teacher_NV, torch.full((rows,), 0.02))[2].passes_N.mean())
    ideal = passes * 2 * logp_student_NV.nbytes
    print(f"memory traffic of one call, epsilon 0.02, with {cache_bytes() / 2**20:.0f} MiB of cache:")
    print(f"  passes x two reads          {ideal / 1e6:8.0f} MB")
    print(f"  to and from main memory     {traffic.moved / 1e6:8.0f} MB  {traffic.moved / ideal:.2f}x")
    print(f"  touched by torch's operators{traffic.touched / 1e6:8.0f} MB  {traffic.touched / ideal:.2f}x, in cache")
    if traffic.moved > 2 * ideal:
        missed.append(f"{traffic.moved / ideal:.2f}x the traffic of passes x two reads, not 2x")
    print("\n".join(f"missed: {line}" for line in missed) or "all targets met")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
