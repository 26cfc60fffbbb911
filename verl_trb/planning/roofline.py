"""Seconds from bandwidth and FLOP/s: a pass takes the longer of reading (weights and KV cache, once) and computing.

Bounds, not forecasts: launch overhead, attention's own FLOPs, the sampler and communication are left out.
"""

from __future__ import annotations

import math

from verl_trb.planning.devices import Device
from verl_trb.planning.shapes import Shape


def pass_seconds(
    shape: Shape, device: Device, batch: int, context: float, positions: int, *, element_bytes: int = 2
) -> float:
    """One pass of a decoding model over `positions` tokens of each of `batch` sequences of `context` tokens."""
    reading = element_bytes * (shape.read + batch * context * shape.kv_elements) / device.bandwidth
    return max(reading, 2 * shape.read * batch * positions / device.flops)


def tokens_per_block(gamma: int, tv: float) -> float:
    """Expected tokens of a block whose drafts are each accepted with probability 1 - tv; there is no bonus token."""
    return (1 - (1 - tv) ** gamma) / tv if tv > 0 else float(gamma)


def tv_bound(epsilon: float) -> float:
    """The total variation that a trust region of `epsilon` nats allows (Pinsker): sqrt(epsilon / 2), at most 1."""
    return min(math.sqrt(epsilon / 2), 1.0)


def guided_rate(
    student: Shape,
    teacher: Shape,
    device: Device,
    batch: int,
    context: float,
    gamma: int,
    tv: float,
    *,
    element_bytes=2,
) -> float:
    """Tokens a second of guided rollouts: gamma passes of the student, one of the teacher over as many positions."""
    drafting = gamma * pass_seconds(student, device, batch, context, 1, element_bytes=element_bytes)
    verifying = pass_seconds(teacher, device, batch, context, gamma, element_bytes=element_bytes)
    return batch * tokens_per_block(gamma, tv) / (drafting + verifying)


def student_rate(student: Shape, device: Device, batch: int, context: float, *, element_bytes: int = 2) -> float:
    """Tokens a second of the student alone."""
    return batch / pass_seconds(student, device, batch, context, 1, element_bytes=element_bytes)


def training_flops(student: Shape, teacher: Shape, checkpointing: bool, adapters: int = 0) -> float:
    """FLOPs of a trained token: student forward, backward (and forward again under checkpointing), teacher forward, and
    the loss, whose logits of both models are computed again in backward. With adapters (their number of parameters) the
    student's own weights have no gradient.
    """
    trained, again = adapters or student.body + student.head, 2 * checkpointing
    layers = (4 + again) * student.body + again * adapters + 4 * adapters + 2 * teacher.body
    logits = 2 * 2 * (student.head + teacher.head) + 2 * student.head
    return layers + logits + 2 * trained
