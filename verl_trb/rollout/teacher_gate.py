"""Skips the teacher's forward pass in the engine while no request needs it (validation, after the warm-up).

While skipped, the teacher's KV cache is not written, so the server closes the gate only between requests and
resets the prefix cache before it opens it again (server.py).
"""

from typing import Any

import torch


class TeacherGate:
    """Stands before the two places where vLLM's runner calls its target model. `skipped` switches it."""

    def __init__(self, runner: Any) -> None:
        self.skipped = False
        self.runner = runner
        model = runner.model
        self.hidden_size = runner.model_config.get_hidden_size()
        self.vocab_size = runner.model_config.get_vocab_size()
        self._forward, self._compute_logits = runner._model_forward, model.compute_logits
        # Instance attributes, as verl's own `monkey_patch_compute_logits`: the runner offers no switch.
        runner._model_forward = self.forward
        model.compute_logits = self.compute_logits

    def forward(self, input_ids: torch.Tensor | None = None, positions: torch.Tensor | None = None, **kwargs: Any):
        if not self.skipped:
            return self._forward(input_ids=input_ids, positions=positions, **kwargs)
        assert positions is not None
        return torch.zeros(positions.shape[-1], self.hidden_size, dtype=self.runner.dtype, device=self.runner.device)

    def compute_logits(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        if not self.skipped:
            return self._compute_logits(hidden_states, *args, **kwargs)
        return hidden_states.new_zeros(()).expand(hidden_states.shape[0], self.vocab_size)
