"""What verl_trb adds to a vLLM worker: the behavior policy's sampler, and weight syncs that reach the student only.

vLLM mixes this class into its worker (`worker_extension_cls`), on CPU and GPU alike. In this engine the
target model is the teacher, which never changes, and the draft model is the student.
"""

from typing import Any

import torch
from verl.utils.device import get_torch_device
from verl.workers.rollout.vllm_rollout.utils import monkey_patch_compute_logits, vLLMColocateWorkerExtension

from verl_trb.policies import get_policy
from verl_trb.rollout import cpu_kernels  # noqa: F401  registers them in the engine's process
from verl_trb.rollout.cpu_reload import layerwise_reload, untracked_segments
from verl_trb.rollout.draft_length import DraftLength
from verl_trb.rollout.drafter import Block, StudentDrafter
from verl_trb.rollout.padded_student import fit_rows
from verl_trb.rollout.request import BlendedRequest
from verl_trb.rollout.sampler import BareSampler, BehaviorSampler, BlendedSampling, Row
from verl_trb.rollout.statistics import RolloutStatistics
from verl_trb.rollout.teacher_gate import TeacherGate
from verl_trb.rollout.trace import RandomState
from verl_trb.verified import as_bytes
from verl_trb.vocabulary import SharedVocabulary


class BlendedWorkerExtension(vLLMColocateWorkerExtension):
    """The methods that our server calls on every vLLM worker through `collective_rpc`."""

    def install_behavior_policy(self, policy: str, vocabulary: dict[str, Any], adapt_drafts: bool = False) -> None:
        """Replace the runner's two samplers and its proposer. Called once, after vLLM has loaded both models and
        warmed up.

        adapt_drafts: blocks have as many drafts as pay, not always as many as the engine was made for.
        """
        runner = self.model_runner
        shared = SharedVocabulary(**{**vocabulary, "masked": tuple(vocabulary["masked"])})
        self.rollout_statistics = RolloutStatistics(runner.device)
        self.teacher_gate = TeacherGate(runner)
        sampling = BlendedSampling(
            view=self._view,
            policy=get_policy(policy),
            vocabulary=shared,
            statistics=self.rollout_statistics,
            gate=self.teacher_gate,
        )
        self.traces, self.kept = sampling.traces, sampling.kept
        longest = runner.speculative_config.num_speculative_tokens
        # One for each state of the gate: steps without the teacher cost less, and reject nothing.
        self.draft_lengths = [DraftLength(longest, None if adapt_drafts else longest) for _ in (False, True)]
        StudentDrafter.take_over(
            runner, length=lambda: self.draft_lengths[self.teacher_gate.skipped], room=lambda: sampling.room
        )
        # The drafter samples inside vLLM: its logits are masked where they are made, with verl's own function.
        monkey_patch_compute_logits(runner.drafter.model, shared.size, list(shared.masked))
        runner.rejection_sampler = BehaviorSampler(runner.rejection_sampler, sampling)
        runner.sampler = BareSampler(runner.sampler, sampling)

    def _view(self) -> tuple[list[Row], Block | None]:
        """The runner's requests in the order of the batch, and the block that this step verifies."""
        runner = self.model_runner
        block = runner.drafter.take_block()
        if block is None and any(token >= 0 for drafts in runner.input_batch.spec_token_ids for token in drafts):
            # Drafts without a distribution: vLLM skipped the student, whose KV cache now has a gap that later
            # requests would read through the prefix cache; or the whole batch is greedy.
            raise RuntimeError(
                "the student gave no distributions for its drafts: raise actor_rollout_ref.rollout.max_model_len, "
                "which a sequence came within 2 * trb.draft_tokens of, or the temperature, if it is 0"
            )
        rows = []
        for request_id in runner.input_batch.req_ids:
            state = runner.requests[request_id]
            params = state.sampling_params
            generated = len(state.output_token_ids)
            rows.append(
                Row(
                    request=BlendedRequest.read(params.extra_args),
                    generated=generated,
                    remaining=params.max_tokens - generated,
                    place=None if block is None else block.place.get(request_id),
                )
            )
        return rows, block

    def fix_draft_tokens(self, drafts: int | None) -> None:
        """Blocks of this many drafts from now on; None: as many as pay."""
        for length in self.draft_lengths:
            length.fixed = drafts

    def skip_teacher(self, skipped: bool) -> None:
        """Close or open the teacher's gate; only while no request is in the engine."""
        self.teacher_gate.skipped = skipped

    def release_teacher(self) -> None:
        """Free the teacher's memory, for good; behind a closed gate."""
        self.teacher_gate.release()

    def take_rollout_statistics(self) -> dict[str, float]:
        """The sums of `RolloutStatistics` since the last call."""
        return self.rollout_statistics.take()

    def take_kept(self, name: str) -> tuple[str, int, bytes]:
        """What was verified of the tokens of the request that asked to keep it under this name (see `Kept`)."""
        kept = self.kept.take(name)
        return as_bytes(torch.empty(0, 1) if kept is None else kept)

    def begin_traces(self) -> None:
        """Before traced requests: remember the random generators."""
        self.random_state = RandomState(self.device)

    def take_traces(self) -> dict[str, dict[str, list[Any]]]:
        """The tokens of the traced requests (see `Traces`); the generators are put back."""
        self.random_state.restore()
        return self.traces.take()

    def _iter_all_models(self):
        """A sync reaches the student alone."""
        yield self.model_runner.drafter.model

    def _iter_all_models_with_config(self):
        # On CPU vLLM repacks the weights layer by layer, in `update_weights_from_ipc` below.
        if self.device.type != "cpu":
            yield self.model_runner.drafter.model, self._get_draft_model_config()

    def update_weights_from_ipc(self, *args: Any, **kwargs: Any) -> None:
        """Receive the student's weights from the trainer."""
        if self.device.type != "cpu":
            return super().update_weights_from_ipc(*args, **kwargs)
        with untracked_segments(), layerwise_reload(self.model_runner.drafter.model, self._get_draft_model_config()):
            super().update_weights_from_ipc(*args, **kwargs)
        get_torch_device().empty_cache()

    def _update_weights(self, weights: list[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> None:
        rows = self._get_draft_model_config().get_vocab_size()
        weights = [(name, fit_rows(name, tensor, rows)) for name, tensor in weights]
        if self.device.type == "cpu":
            # The layerwise reload keeps tensors until a layer is complete; the transfer buffer is reused before.
            weights = [(name, tensor.clone()) for name, tensor in weights]
        super()._update_weights(weights, *args, **kwargs)
