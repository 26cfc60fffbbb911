"""A trained student as a Hugging Face folder: of a run's last step, and of a checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def source_dtype(folder: Path) -> torch.dtype:
    """The dtype that a model folder's config.json names; float32 where it names none."""
    source = json.loads((folder / "config.json").read_text())
    return getattr(torch, source.get("dtype") or source.get("torch_dtype") or "float32")


def save_student(
    target: Path, state: Mapping[str, Tensor], config: Any, dtype: torch.dtype, tokenizer: Any, generation: Any
) -> None:
    """Writes safetensors in `dtype`, the configuration, the tokenizer and, unless None, the generation defaults.

    state: every parameter of the model, whole, under its Hugging Face name.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    # A tied output layer is written once: shards put together again no longer share their memory, which would say so.
    own = dict(model.named_parameters())
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - own.keys()
    weights = {name: value.to(dtype) for name, value in state.items() if name not in tied}
    model.save_pretrained(target, state_dict=weights)
    tokenizer.save_pretrained(target)
    if generation is not None:
        generation.save_pretrained(target)
