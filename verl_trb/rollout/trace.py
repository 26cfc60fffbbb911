"""What the sampler saw at every token of a few requests, for the report's sample rollouts.

A request with a name in its `extra_args` is traced; all others cost one look at the batch. Tracing draws random numbers
like any rollout, so the worker puts its generators back afterwards: a run with samples is the run without (but for
`trb.adapt_drafts`, which learns from their steps).

Shapes: R requests of the batch with drafts, G drafts a block.
"""

from typing import Any

import torch
from torch import Tensor

COLUMNS = ("tokens", "corrected", "drafts", "logp_student", "log_mu")


class Traces:
    """Columns of values a token, by request name, since the last `take`."""

    def __init__(self) -> None:
        self.columns: dict[str, dict[str, list[Any]]] = {}

    def add(self, names_R: list[str | None], kept_RG: Tensor, **columns_RG: Tensor) -> None:
        """The kept tokens of the named requests; columns_RG: one [R, G] tensor for each of `COLUMNS`."""
        for row, name in enumerate(names_R):
            if name is None:
                continue
            trace = self.columns.setdefault(name, {column: [] for column in COLUMNS})
            for column in COLUMNS:
                trace[column] += columns_RG[column][row][kept_RG[row]].tolist()

    def take(self) -> dict[str, dict[str, list[Any]]]:
        """Everything since the last call."""
        taken, self.columns = self.columns, {}
        return taken


class RandomState:
    """The random generators that a worker draws from, to be put back as they were."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.host = device, torch.get_rng_state()
        self.accelerator = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)

    def restore(self) -> None:
        torch.set_rng_state(self.host)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)
