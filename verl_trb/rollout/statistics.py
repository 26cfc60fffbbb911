"""Sums over the tokens of one training step's rollouts, kept on the engine's device until they are asked for."""

import torch

COUNTS = ("tokens", "verified", "accepted", "blocks", "student_nan", "teacher_nan")
SUMS = ("beta", "kl", "tv", "log_ratio")
MAXIMA = ("beta_max", "kl_max")


class RolloutStatistics:
    """Accumulates per-position values of the blocks that became rollout tokens; no host synchronization.

    tokens    emitted rollout tokens            verified  drafts read by the teacher up to the first rejection
    accepted  drafts that were kept             blocks    teacher passes, counted once per sequence and block
    student_nan, teacher_nan  positions at which a model's logits were no distribution (NaN, or infinite)
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.values = {
            name: torch.zeros((), dtype=torch.float64, device=self.device) for name in COUNTS + SUMS + MAXIMA
        }

    def add(self, **values: torch.Tensor) -> None:
        """Each value is a tensor that is summed, or for MAXIMA reduced by its maximum; empty tensors are skipped."""
        for name, value in values.items():
            if value.numel() == 0:
                continue
            if value.is_floating_point():
                value = value.nan_to_num(0.0)  # the β of policies that have none
            if name in MAXIMA:
                self.values[name] = torch.maximum(self.values[name], value.max().double())
            else:
                self.values[name] += value.sum(dtype=torch.float64)

    def take(self) -> dict[str, float]:
        """The sums since the last call, as Python floats; starts anew."""
        taken = {name: float(value) for name, value in self.values.items()}
        self.reset()
        return taken


def merge(parts: list[dict[str, float]]) -> dict[str, float]:
    """The sums of several engines as one."""
    merged: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            merged[name] = max(merged.get(name, 0.0), value) if name in MAXIMA else merged.get(name, 0.0) + value
    return merged


def rollout_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Means per token (nats, or fractions) from the sums of one step; empty when nothing was sampled."""
    tokens = sums.get("tokens", 0.0)
    if not tokens:
        return {}
    verified = max(sums["verified"], 1.0)
    return {
        "trb/beta/mean": sums["beta"] / tokens,
        "trb/beta/max": sums["beta_max"],
        "trb/kl/mean": sums["kl"] / tokens,
        "trb/kl/max": sums["kl_max"],
        "trb/tv": sums["tv"] / verified,
        "trb/acceptance": sums["accepted"] / verified,
        "trb/tokens_per_teacher_pass": tokens / max(sums["blocks"], 1.0),
        "trb/log_ratio": sums["log_ratio"] / tokens,
    }
