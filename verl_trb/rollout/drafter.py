"""The student in the engine: vLLM's draft-model proposer with these changes.

* It chooses how many tokens a block has (`draft_length.py`), before it drafts the block.
* It keeps the block's last draft back. Of n scheduled drafts vLLM's target model computes n + 1 rows of logits, and
  the last one, its "bonus" row, verifies the draft that was kept: γ drafts cost the teacher γ positions.
* It keeps log π_S at the drafts where vLLM's keeps π_S, and on a CPU it draws by one random number a row.
* It does not read again what it drafted itself. vLLM's proposer starts a block with a pass over the whole previous
  one, because a proposer may need the target's hidden states there. The student's own keys and values of the drafts
  are in its cache from drafting them, so a pass over the one new token does.
* It drafts no further than any request can still go, and nothing where all have ended. What vLLM caches of those has
  the student's keys and values, too: it was verified, so drafted.

Shapes: B requests of the batch, G drafts a block (γ), V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.spec_decode.utils import compute_new_slot_mapping

from verl_trb.bits import exp
from verl_trb.coupling import draw
from verl_trb.rollout.draft_length import DraftLength


@dataclass
class Block:
    """What the student drafted in one step of the engine, for the next step to verify.

    tokens_BG: int64 drafts; logp_BGV: float32, log π_S at each; place: row of each request that has drafts;
    generated: how many tokens each request had before the step; verified: drafts a row of the block that this step
    verified, 0 if some row had none; rows, finished: the batch's size, and when the block was ready (seconds).
    """

    tokens_BG: torch.Tensor
    logp_BGV: torch.Tensor
    place: dict[str, int]
    generated: dict[str, int]
    verified: int
    rows: int
    finished: float

    @property
    def drafts(self) -> int:
        return self.tokens_BG.shape[1]


class StudentDrafter(DraftModelProposer):
    """Takes over the runner's proposer, whose class it becomes: the runner constructs vLLM's own and offers no other
    way in (its `custom_class` method is for proposers without a model and a KV cache).
    """

    @classmethod
    def take_over(
        cls, runner: Any, length: Callable[[], DraftLength], room: Callable[[], int | None]
    ) -> StudentDrafter:
        """length: what decides on the number of drafts now. room: `BlendedSampling`'s."""
        drafter: StudentDrafter = runner.drafter
        drafter.__class__ = cls
        drafter.runner, drafter.length, drafter.room = runner, length, room
        drafter.drafted = drafter.verifying = None
        drafter.goes_on = False
        return drafter

    runner: Any
    length: Callable[[], DraftLength]
    room: Callable[[], int | None]
    drafted: Block | None  # in the last step, for the next one
    verifying: Block | None  # what the current step verifies
    goes_on: bool  # every row of the batch continues a block of ours
    rejected_B: torch.Tensor | None
    _last_draft_probs: torch.Tensor | None

    def take_block(self) -> Block | None:
        """The block that the current step verifies; once a step. None if the last step drafted nothing."""
        self.verifying, self.drafted = self.drafted, None
        return self.verifying

    def take_last_draft_probs(self) -> None:
        """Kept in the block instead: vLLM would gather and copy them for its own rejection sampler."""
        return None

    def propose(
        self, num_speculative_tokens: int, *, num_rejected_tokens_gpu: torch.Tensor | None = None, **inputs: Any
    ) -> torch.Tensor:
        """Drafts of which the scheduler learns all but the last: [B, γ − 1]."""
        requests = self.runner.input_batch.req_ids
        generated = {name: len(self.runner.requests[name].output_token_ids) for name in requests}
        length, continued = self.length(), self.verifying
        if continued is not None and not all(name in continued.place for name in requests):
            continued = None
        self.goes_on = continued is not None
        if continued is not None:
            for name in requests:
                length.saw_block(continued.verified, generated[name] - continued.generated[name])
        room = self.room()
        if room == 0:
            return torch.zeros(len(requests), 0, dtype=torch.int64, device=self.device)
        drafts = self._choose(length, len(requests))
        if room is not None:
            drafts = min(drafts, room)
        self.rejected_B = num_rejected_tokens_gpu
        tokens_BG = super().propose(
            drafts, num_rejected_tokens_gpu=None if self.goes_on else num_rejected_tokens_gpu, **inputs
        )
        logp_BGV, self._last_draft_probs = self._last_draft_probs, None
        finished = time.perf_counter()
        if continued is not None and continued.verified == continued.drafts == drafts:
            if continued.rows == len(requests):
                length.saw_step(len(requests), drafts, finished - continued.finished)
        if logp_BGV is None:  # all requests are greedy: nothing can be verified, and the sampler says so
            return tokens_BG
        # Rows in the middle of their prompt get drafts too, from a token that is not theirs.
        unfinished = self.runner.discard_request_mask.np[: len(requests)]
        self.drafted = Block(
            tokens_BG=tokens_BG,
            logp_BGV=logp_BGV,
            place={name: row for row, name in enumerate(requests) if not unfinished[row]},
            generated=generated,
            verified=continued.drafts if continued is not None else 0,
            rows=len(requests),
            finished=finished,
        )
        return tokens_BG[:, :-1]

    def _sample_from_logits(self, logits: torch.Tensor, sampling_metadata: Any) -> tuple[torch.Tensor, Any]:
        """Tokens of π_S, and log π_S."""
        if not sampling_metadata.all_random or logits.device.type != "cpu":
            tokens, probs = super()._sample_from_logits(logits, sampling_metadata)
            return tokens, None if probs is None else probs.log()
        logp_BV = (logits / sampling_metadata.temperature.view(-1, 1)).log_softmax(-1)  # float32, as temperatures are
        return draw(exp(logp_BV)), logp_BV

    @staticmethod
    def _choose(length: DraftLength, rows: int) -> int:
        drafts, group = length.choose(rows), get_tp_group()
        if group.world_size > 1 and length.fixed is None:  # each rank has a clock of its own
            drafts = group.broadcast_object(drafts, src=0)
        return drafts

    def set_inputs_first_pass(
        self, target_token_ids: Any, next_token_ids: Any, target_positions: Any, target_hidden_states: Any,
        token_indices_to_sample: Any, cad: Any, num_rejected_tokens_gpu: Any,
    ) -> tuple[int, torch.Tensor, Any]:  # fmt: skip
        """One token a row where every row goes on, at the position behind what was accepted; else vLLM's own."""
        if not self.goes_on:
            return super().set_inputs_first_pass(
                target_token_ids, next_token_ids, target_positions, target_hidden_states,
                token_indices_to_sample, cad, num_rejected_tokens_gpu,
            )  # fmt: skip
        rows = cad.batch_size()
        position_B = cad.seq_lens if self.rejected_B is None else cad.seq_lens - self.rejected_B
        self.input_ids[:rows] = next_token_ids
        self.positions[:rows] = position_B
        one = cad.replace(
            query_start_loc=self.arange[: rows + 1],
            query_start_loc_cpu=torch.from_numpy(self.token_arange_np[: rows + 1]).clone(),
            seq_lens=position_B + 1,
            num_actual_tokens=rows,
            max_query_len=1,
            max_seq_len=cad.max_seq_len + 1,
            _seq_lens_cpu=None,
            _num_computed_tokens_cpu=None,
        )
        slots_B = compute_new_slot_mapping(
            cad=one,
            new_positions=self.positions[:rows],
            is_rejected_token_mask=torch.zeros(rows, dtype=torch.bool, device=self.device),
            block_size=self.block_size,
            num_new_tokens=0,
            max_model_len=self.max_model_len,
        )
        return rows, self.arange[:rows], one.replace(slot_mapping=slots_B)
