"""Skips the teacher's forward pass in the engine while no request needs it (validation, after the warm-up).

While skipped, the teacher's KV cache is not written, so the server closes the gate only between requests and
resets the prefix cache before it opens it again (server.py). Once no step of the run will need the teacher any more,
its weights and its keys and values can be freed; then the gate stays closed.
"""

import gc
from collections.abc import Callable
from typing import Any, NoReturn

import torch


class TeacherGate:
    """Stands before the two places where vLLM's runner calls its target model. `skipped` switches it.

    hidden_LE: the teacher's last hidden states of the current step, a row for each row of its logits.
    """

    hidden_LE: torch.Tensor

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
        self.hidden_LE = hidden_states
        if not self.skipped:
            return self._compute_logits(hidden_states, *args, **kwargs)
        return hidden_states.new_zeros(()).expand(hidden_states.shape[0], self.vocab_size)

    def release(self) -> None:
        """Free the teacher's weights, and the KV cache tensors that no layer of the student shares.

        The cache keeps its number of blocks: vLLM plans it once.
        """
        assert self.skipped, "the teacher is released behind a closed gate"
        runner = self.runner
        self._forward = self._compute_logits = _released
        runner.model = ReleasedTeacher(self.compute_logits)
        student = {name for group in runner.drafter.draft_attn_groups for name in group.layer_names}
        layers = runner.compilation_config.static_forward_context
        for tensor in runner.kv_cache_config.kv_cache_tensors:
            if student.isdisjoint(tensor.shared_by):
                for name in tensor.shared_by:
                    kept = layers[name].kv_cache
                    runner.kv_caches[:] = [cache for cache in runner.kv_caches if cache is not kept]
                    layers[name].kv_cache = None
        gc.collect()
        if runner.device.type != "cpu":
            torch.accelerator.empty_cache()


class ReleasedTeacher(torch.nn.Module):
    """What the runner holds instead of the teacher: the gate's answers."""

    def __init__(self, compute_logits: Callable[..., torch.Tensor | None]) -> None:
        super().__init__()
        self.compute_logits = compute_logits


def _released(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError("the teacher was asked for a forward pass after trb.release_teacher had freed its memory")
