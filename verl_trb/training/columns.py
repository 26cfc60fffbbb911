"""Rollouts by column, as TransferQueue stores them, without tensordict's wrapper around every value.

TransferQueue's type for what is put is a TensorDict, of which it reads the names, the columns and their number. A
TensorDict wraps every value that is not a tensor: 0.1 ms each, twice, for a dozen fields of every rollout.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


class Columns(dict[str, Any]):
    """Rows of the same fields: tensors stacked, nested where their shapes differ, anything else an array of objects."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        super().__init__({name: _column([row[name] for row in rows]) for name in rows[0]})
        self.batch_size = torch.Size([len(rows)])


def _column(values: list[Any]) -> torch.Tensor | np.ndarray:
    if not all(isinstance(value, torch.Tensor) for value in values):
        return np.fromiter(values, dtype=object, count=len(values))  # pickled as one, so that types stay
    if all(value.shape == values[0].shape for value in values):
        return torch.stack(values)
    return torch.nested.as_nested_tensor(values, layout=torch.jagged)
