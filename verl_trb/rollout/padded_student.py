"""Students whose embedding has more or fewer rows than the teacher's (padding differs between sizes of a family).

vLLM wants draft and target model to have one vocabulary size. The rows beyond the tokenizer are never used, so the
engine gets a copy of the student's folder with the teacher's number of rows, and its embedding and output layer are
padded or cut again whenever weights arrive.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the configuration is checked without torch
    import torch

PER_TOKEN = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias")


def with_rows(student: str, student_rows: int, teacher_rows: int) -> str:
    """A student's folder with the teacher's number of embedding rows: the folder itself where they agree.

    The copy is in a temporary folder; files without a row per token are links. Weights must be safetensors.
    """
    if student_rows == teacher_rows:
        return student
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder = Path(tempfile.mkdtemp(prefix="verl_trb_student_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for file in Path(student).iterdir():
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as weights:
                tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118  not a dict
                metadata = weights.metadata()
            fitted = {name: fit_rows(name, tensor, teacher_rows) for name, tensor in tensors.items()}
            if any(fitted[name] is not tensors[name] for name in tensors):
                save_file(fitted, folder / file.name, metadata)
                continue
        if file.is_file() and file.name != "config.json":
            os.symlink(file.resolve(), folder / file.name)
    config = json.loads((Path(student) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": teacher_rows}))
    return str(folder)


def fit_rows(name: str, tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """A student's parameter with `rows` rows where it has one row a token; padded with zeros, or cut."""
    if not name.endswith(PER_TOKEN) or tensor.shape[0] == rows:
        return tensor
    fitted = tensor.new_zeros(rows, *tensor.shape[1:])
    kept = min(rows, tensor.shape[0])
    fitted[:kept] = tensor[:kept]
    return fitted
