"""What the toy tasks share: the settings of their models, a target to learn, a row of verl's data files. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """A Qwen3 architecture; head_dim 32 is the smallest that vLLM's CPU attention knows."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 32


@dataclass(frozen=True)
class Sft:
    """Settings of one supervised fine-tuning: learning rate peak `lr`, warm-up, then linear decay to 0 at `steps`.

    defects: what is wrong with the responses, in the task's own terms.
    """

    steps: int
    lr: float
    defects: Any
    warmup: int = 30
    batch_size: int = 32
    weight_decay: float = 0.01
    seed: int = 0


@dataclass(frozen=True)
class ToySettings:
    """Everything that a toy task's models and data depend on; part of the cache key."""

    teacher: ModelShape
    student: ModelShape
    teacher_sft: Sft
    student_sft: Sft
    num_train: int = 8192
    num_val: int = 512
    data_seed: int = 0


@dataclass(frozen=True)
class Target:
    """A response to learn, with its EOS, and the weight of each character in the loss; 0 is not learned."""

    text: str
    weights: list[float]


def data_row(source: str, prompt: str, truth: str, index: int, split: str) -> dict[str, Any]:
    """A row of verl's train or validation file: one user message, and the ground truth of a rule."""
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": prompt}],
        "ability": "toy",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"index": index, "split": split},
    }
