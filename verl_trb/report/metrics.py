"""What a run's metrics.jsonl says: its steps, sorted and cleaned, and a summary of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

Metrics = list[dict[str, Any]]

TIME_PARTS = ("rollouts", "teacher", "update", "old log-probs", "weight sync", "checkpoint", "other")


class Point(NamedTuple):
    step: int
    value: float


@dataclass(frozen=True)
class Summary:
    """A run in a few numbers; `None` where the run did not record the metric.

    Accuracies and acceptance are fractions, the reverse KL is in nats per token, times are in seconds.
    `acceptance` is the mean over the warm-up (ε > 0); `total_seconds` covers training steps and validations.
    """

    steps: int
    accuracy_first: Point | None
    accuracy_last: Point | None
    accuracy_best: Point | None
    reverse_kl_first: Point | None
    reverse_kl_last: Point | None
    acceptance: float | None
    step_seconds: float | None
    total_seconds: float | None
    total_tokens: int | None


def read_metrics(run_dir: Path) -> Metrics:
    """The steps of `run_dir`/metrics.jsonl, sorted by step. Raises `ValueError` if there are none.

    A killed run leaves half a line and, once resumed, repeats the steps since its last checkpoint. Half a
    line is ignored; of a value written twice the last one counts; steps past the resumption are forgotten.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.parent.is_dir():
        raise ValueError(f"{run_dir} is not a run folder: there is no such folder.")
    if not path.is_file():
        raise ValueError(f"{run_dir} has no metrics.jsonl: no step of it was finished yet.")
    steps: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            # Objects are flat: the last "{" starts the last one, also behind the half line of a killed run.
            metrics = json.loads(line[max(line.rfind("{"), 0) :])
            step = int(metrics["step"])
        except (ValueError, TypeError, KeyError):
            continue
        steps = {known: values for known, values in steps.items() if known <= step}
        steps[step] = {**steps.get(step, {}), **metrics, "step": step}
    if not steps:
        raise ValueError(f"{path} holds no finished step yet: wait for the first one and try again.")
    return [steps[step] for step in sorted(steps)]


def points(metrics: Metrics, key: str) -> list[Point]:
    """The steps at which `key` was recorded as a finite number."""
    values = ((row["step"], row.get(key)) for row in metrics)
    return [Point(int(s), float(v)) for s, v in values if isinstance(v, int | float) and math.isfinite(v)]


def guided(metrics: Metrics) -> Metrics:
    """The steps in which the teacher verifies the student's drafts: their ε is not 0, or the policy has none."""
    return [row for row in metrics if "trb/acceptance" in row and row.get("trb/epsilon") != 0]


def bounded(metrics: Metrics) -> bool:
    """Whether a trust region (ε > 0) bounds the rollouts of some step."""
    return any(p.value > 0 for p in points(metrics, "trb/epsilon"))


def guidance_end(metrics: Metrics) -> int | None:
    """The first step with ε = 0 after guided ones: from here on the student samples alone."""
    last = max((row["step"] for row in guided(metrics)), default=None)
    return next((p.step for p in points(metrics, "trb/epsilon") if last is not None and p.step > last), None)


def summary(metrics: Metrics) -> Summary:
    """The numbers a user wants first (see `Summary`)."""
    accuracy, loss = points(metrics, "val/accuracy"), points(metrics, "trb/reverse_kl")
    seconds, testing, tokens, accepted = (
        [p.value for p in points(rows, key)]
        for rows, key in (
            (metrics, "timing_s/step"),
            (metrics, "timing_s/testing"),
            (metrics, "perf/total_num_tokens"),
            (guided(metrics), "trb/acceptance"),
        )
    )
    return Summary(
        steps=int(metrics[-1]["step"]) if metrics else 0,
        accuracy_first=accuracy[0] if accuracy else None,
        accuracy_last=accuracy[-1] if accuracy else None,
        accuracy_best=max(accuracy, key=lambda p: p.value, default=None),
        reverse_kl_first=loss[0] if loss else None,
        reverse_kl_last=loss[-1] if loss else None,
        acceptance=sum(accepted) / len(accepted) if accepted else None,
        step_seconds=sum(seconds) / len(seconds) if seconds else None,
        total_seconds=sum(seconds + testing) if seconds else None,
        total_tokens=int(sum(tokens)) if tokens else None,
    )


def time_parts(metrics: Metrics) -> dict[str, float]:
    """Mean seconds of a training step by part, in the order of `TIME_PARTS`; parts that took no time are left out.

    verl's `update_actor` contains the teacher's forward passes, which are taken out of it here; `other` is what of
    `step` no part accounts for. Means are over all steps, so that a checkpoint at every tenth step counts a tenth.
    """
    rows = [row for row in metrics if isinstance(row.get("timing_s/step"), int | float)]
    if not rows:
        return {}

    def mean(*names: str) -> float:
        return sum(float(row.get(f"timing_s/{name}") or 0.0) for row in rows for name in names) / len(rows)

    parts = {
        "rollouts": mean("gen"),
        "teacher": mean("teacher"),
        "update": max(mean("update_actor") - mean("teacher"), 0.0),
        "old log-probs": mean("old_log_prob"),
        "weight sync": mean("update_weights"),
        "checkpoint": mean("save_checkpoint"),
    }
    parts["other"] = max(mean("step") - sum(parts.values()), 0.0)
    return {name: parts[name] for name in TIME_PARTS if parts[name] > 0}


def run_names(run_dirs: Sequence[Path]) -> list[str]:
    """What each of several runs is called: its label, or the name of its folder where labels are the same."""
    labels = [run_label(run_dir) for run_dir in run_dirs]
    return [
        label if labels.count(label) == 1 else Path(run_dir).resolve().name
        for label, run_dir in zip(labels, run_dirs, strict=True)
    ]


def run_label(run_dir: Path) -> str:
    """What a run is called in the picture: its policy from config.yaml, or else the name of its folder."""
    try:
        trb = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))["trb"]
        policy, trb_label = str(trb["policy"]), f"TRB ε₀={float(trb['epsilon']):g} K={trb['warmup_steps']}"
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return run_dir.resolve().name
    name = trb.get("method") or policy.rpartition(":")[2]
    return {"student": "vanilla OPD (student rollouts)", "trb": trb_label}.get(policy, name)
