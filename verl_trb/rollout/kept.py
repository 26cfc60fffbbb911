"""What verification says of the teacher at every token of the rollouts that ask for it (verl_trb/verified.py).

Shapes: R requests of the batch with drafts, G drafts a block, C columns or hidden size, T tokens of a rollout.
"""

import torch
from torch import Tensor


class Kept:
    """Rows of kept tokens, by the request's name, until they are taken."""

    def __init__(self) -> None:
        self.blocks: dict[str, list[Tensor]] = {}

    def add(self, names_R: list[str | None], kept_RG: Tensor, columns_RGC: Tensor) -> None:
        """The kept tokens of a block. Two copies to the host, whatever the batch."""
        kept_RG, columns_RGC = kept_RG.cpu(), columns_RGC.cpu()
        for row, name in enumerate(names_R):
            if name is not None:
                self.blocks.setdefault(name, []).append(columns_RGC[row][kept_RG[row]])

    def take(self, name: str) -> Tensor | None:
        """[T, C] of one rollout, or None if it has no token."""
        blocks = self.blocks.pop(name, [])
        return torch.cat(blocks) if blocks else None
