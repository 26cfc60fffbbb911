"""Memory that is used again: on a CPU fresh memory costs page faults, which large temporaries feel."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class Scratch:
    """Buffers by name."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def empty(self, name: str, shape: torch.Size, like: Tensor) -> Tensor:
        """An uninitialized tensor of like's dtype; on a CPU it overwrites the previous one of that name."""
        if like.device.type != "cpu":
            return like.new_empty(shape)
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < shape.numel() or buffer.dtype != like.dtype:
            with torch.inference_mode(False):  # usable inside of it and outside
                buffer = self.buffers[name] = like.new_empty(shape.numel())
        return buffer[: shape.numel()].view(shape)


class ThreadScratch(threading.local, Scratch):
    """One for each thread, for as long as the process lives."""


def most_rows(numbers: int, like_NV: Tensor, otherwise: int) -> int:
    """How many rows of V have that many numbers together, on a CPU; at least one, at most and elsewhere `otherwise`."""
    return min(otherwise, max(1, numbers // like_NV.shape[-1])) if like_NV.device.type == "cpu" else otherwise
