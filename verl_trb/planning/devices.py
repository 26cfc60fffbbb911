"""GPUs by their data sheets, and clusters by name: 8xH100-80GB, 2x8xA100-40GB, 1xRTX4090-24GB, cpu."""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from verl_trb.errors import UserError

GB = 10**9
GIB = 2**30


@dataclass(frozen=True)
class Device:
    """memory: bytes. bandwidth: bytes/s. flops: dense FLOP/s, bfloat16 on a GPU."""

    name: str
    memory: int
    bandwidth: float
    flops: float


def _gpu(name: str, gib: int, terabytes: float, teraflops: float) -> Device:
    return Device(f"{name}-{gib}GB", gib * GIB, terabytes * 1e12, teraflops * 1e12)


# Memory, its bandwidth, and dense bfloat16 FLOP/s of the data sheets (SXM where there are several).
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("H100", 80, 3.35, 989),
        _gpu("H200", 141, 4.8, 989),
        _gpu("H20", 96, 4.0, 148),
        _gpu("B200", 180, 7.7, 2250),
        _gpu("A100", 80, 2.04, 312),
        _gpu("A100", 40, 1.56, 312),
        _gpu("L40S", 48, 0.864, 362),
        _gpu("L4", 24, 0.3, 121),
        _gpu("A10", 24, 0.6, 125),
        _gpu("RTX4090", 24, 1.01, 165),
        _gpu("RTX5090", 32, 1.79, 210),
        _gpu("RTX3090", 24, 0.936, 71),
    )
}
CPU = "cpu"


@dataclass(frozen=True)
class Cluster:
    """`nodes` machines with `per_node` devices each."""

    nodes: int
    per_node: int
    device: Device

    @property
    def devices(self) -> int:
        return self.nodes * self.per_node


def parse_cluster(text: str) -> Cluster:
    """NxNAME-MEM, or NODESxNxNAME-MEM, or cpu. Raises UserError, with near matches, for what is none of these."""
    if text == CPU:
        return Cluster(1, 1, this_cpu())
    match = re.fullmatch(r"(?:(\d+)x)?(\d+)x([A-Za-z][\w ]*-\d+GB?)", text, re.IGNORECASE)
    if not match or min(int(match[1] or 1), int(match[2])) < 1:
        raise UserError(f"cluster={text} is not of the form 8xH100-80GB, 2x8xH100-80GB (nodes x GPUs) or cpu.")
    wanted = re.sub(r"[ _]", "", match[3]).upper().removesuffix("B").removesuffix("G") + "GB"
    if wanted not in GPUS:
        near = difflib.get_close_matches(wanted, GPUS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(GPUS)}."
        raise UserError(f"cluster={text} names a GPU that is not in the table: {hint}")
    return Cluster(int(match[1] or 1), int(match[2]), GPUS[wanted])


def this_cpu() -> Device:
    """This machine: its memory, and what one process reaches in a second of copying and multiplying (float32)."""
    import psutil
    import torch

    size = 1 << 26  # 256 MiB: well beyond the caches
    source, target = torch.ones(size), torch.empty(size)
    matrix_MM, product_MM = torch.ones(1024, 1024), torch.empty(1024, 1024)
    copying = _fastest(lambda: target.copy_(source))
    multiplying = _fastest(lambda: torch.mm(matrix_MM, matrix_MM, out=product_MM))
    return Device(CPU, psutil.virtual_memory().total, 2 * 4 * size / copying, 2 * 1024**3 / multiplying)


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)
