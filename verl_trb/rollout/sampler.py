"""The sampler that replaces vLLM's: exact draws from the behavior policy μ out of the student's drafts.

    draft z ~ π_S  →  policy(log π_S, log π_T) = log μ  →  keep z with probability min(1, μ(z)/π_S(z)),
    else draw from (μ − π_S)₊ and drop the rest of the block.

The drafts are those that the worker keeps (drafter.py): for n drafts that vLLM scheduled there are n + 1 rows of the
teacher's logits, and they verify n + 1 drafts. There is no bonus token: behind the last draft π_S is unknown. A row
without drafts is never sampled: it gets its forced first token, or the marker that ends the request so that the
server can resubmit it. A row whose request has no parameters is not guided: its μ is π_S, bitwise, whatever the policy.

Where the policy asks for it (`marks_corrections`), the log-probability of a correction, a token that replaced a
rejected draft, is returned with a positive sign. verl's agent loops align, cut and pad log-probabilities with their
tokens over any number of turns, so the mark stays with its token; training/agent_loop.py takes it off again.

Shapes: B requests of the batch, R of them with drafts, G drafts a block (γ), N = Σ drafts, V vocabulary, E hidden size
of the teacher, L = Σ (n + 1) rows of logits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID, RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from verl_trb.coupling import couple, mark_corrections
from verl_trb.policies import Policy, behavior, get_policy, teacher_logprobs
from verl_trb.rollout.drafter import Block
from verl_trb.rollout.kept import Kept
from verl_trb.rollout.request import BlendedRequest
from verl_trb.rollout.statistics import RolloutStatistics
from verl_trb.rollout.teacher_gate import TeacherGate
from verl_trb.rollout.trace import Traces
from verl_trb.verified import HIDDEN_STATES, verified
from verl_trb.vocabulary import SharedVocabulary

# The logarithm of the smallest float32, which stands in the statistics for probabilities that underflowed to 0.
LOG_LEAST = math.log(2.0**-149)


@dataclass
class Row:
    """One request of the batch: its settings, how many tokens it has so far and how many it may still get.

    place: its row in the block that the student drafted, None where it has no drafts.
    """

    request: BlendedRequest | None
    generated: int
    remaining: int
    place: int | None


@dataclass
class BlendedSampling:
    """The rule, the vocabulary, and a view of the runner's requests: makes tokens of what vLLM's runner computed.

    room: the most tokens that a request of the last batch may still get, 0 if all have ended; None where a request was
    not verified, and on a GPU, which would wait for it.
    """

    view: Callable[[], tuple[list[Row], Block | None]]
    policy: Policy
    vocabulary: SharedVocabulary
    statistics: RolloutStatistics
    gate: TeacherGate
    traces: Traces = field(default_factory=Traces)
    kept: Kept = field(default_factory=Kept)
    room: int | None = None

    def draw(self, scheduled: list[int], logits: torch.Tensor, sampling_metadata: SamplingMetadata) -> SamplerOutput:
        """Tokens for every request of the batch; `logits` [L, V] has scheduled + 1 rows for each."""
        rows, block = self.view()
        self.room = None
        device = logits.device
        verified = [0] * len(rows)
        if block is not None:
            for i, (row, n) in enumerate(zip(rows, scheduled, strict=True)):
                if row.place is not None and row.request is not None and row.generated > 0:
                    verified[i] = min(n + 1, block.drafts)
        columns = max(scheduled) + 1
        tokens_BC = torch.full((len(rows), columns), PLACEHOLDER_TOKEN_ID, dtype=torch.long, device=device)
        logp_BC = torch.zeros((len(rows), columns), dtype=torch.float32, device=device)

        bare = [i for i, n in enumerate(verified) if n == 0]
        if bare:
            forced = [self.token_without_draft(rows[i]) for i in bare]
            tokens_BC[bare, 0] = torch.tensor(forced, device=device)

        index_R = [i for i, n in enumerate(verified) if n > 0]
        if index_R and block is not None:
            hidden = self.gate.hidden_LE
            if verified != [n + 1 for n in scheduled]:
                kept: list[int] = []
                start = 0
                for n, k in zip(scheduled, verified, strict=True):
                    kept += range(start, start + k)
                    start += n + 1
                verifying = torch.tensor(kept, device=device)
                logits, hidden = logits[verifying], hidden[verifying]
            known_R = [rows[i] for i in index_R], [verified[i] for i in index_R]
            tokens_RG, logp_RG, room_R = self._verify(*known_R, index_R, block, logits, hidden, sampling_metadata)
            self.room = int(room_R.max()) if device.type == "cpu" and not bare else None
            if len(index_R) == len(rows):
                tokens_BC[:, : tokens_RG.shape[1]], logp_BC[:, : logp_RG.shape[1]] = tokens_RG, logp_RG
            else:
                tokens_BC[index_R, : tokens_RG.shape[1]], logp_BC[index_R, : logp_RG.shape[1]] = tokens_RG, logp_RG
        return _output(tokens_BC, logp_BC)

    def policy_of(self, rows: list[Row]) -> Policy:
        """The run's own, or the one that all guided rows ask for. Raises RuntimeError if they disagree: requests of
        two training steps never meet in the engine.
        """
        names = {row.request.policy for row in rows if row.request is not None and row.request.params is not None}
        if len(names) > 1:
            raise RuntimeError(f"one batch asks for several rollout policies: {sorted(map(str, names))}")
        name = next(iter(names), None)
        return self.policy if name is None else get_policy(name)

    def token_without_draft(self, row: Row) -> int:
        """The forced first token of a fresh request; else the marker, because π_S, and so μ, is unknown."""
        if row.request is not None and row.generated == 0:
            if row.request.seed is not None:
                torch.manual_seed(row.request.seed)  # the student's drafts and the coupling draw from it
            return row.request.forced_token
        return self.vocabulary.marker

    def _verify(
        self,
        rows: list[Row],
        num_drafts: list[int],
        index_R: list[int],
        block: Block,
        logits_NV: torch.Tensor,
        hidden_NE: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For the rows that have drafts, `index_R` of the batch: tokens [R, G] (−1: none), their log μ, and [R] how
        many tokens each may still get.
        """
        device = logits_NV.device
        vocabulary = self.vocabulary
        num_drafts_R = torch.tensor(num_drafts, device=device)

        places, width = [row.place for row in rows], max(num_drafts)
        full = len(set(num_drafts)) == 1  # nearly always: then nothing is padded or copied
        whole = full and width == block.drafts and places == list(range(len(block.tokens_BG)))
        place_R = slice(None) if whole else torch.tensor(places, device=device)
        drafts_RG = block.tokens_BG[place_R, :width]
        logp_student_RGV = block.logp_BGV[place_R, :width, : vocabulary.size]
        if full:
            logp_student_NV = logp_student_RGV.flatten(0, 1)
        else:
            drafted_RG = torch.arange(width, device=device) < num_drafts_R.unsqueeze(1)
            logp_student_NV = logp_student_RGV[drafted_RG]
        temperature_N = None
        if sampling_metadata.temperature is not None:
            temperature_R = sampling_metadata.temperature
            if len(index_R) < len(temperature_R):
                temperature_R = temperature_R[index_R]
            temperature_N = temperature_R.repeat_interleave(width if full else num_drafts_R)
        teacher_NV = None if self.gate.skipped else logits_NV
        self.statistics.add(student_nan=logp_student_NV.sum(-1).isnan())  # a sum is NaN where a term is
        if teacher_NV is not None:
            sum_N = teacher_NV.sum(-1, dtype=torch.float32)
            self.statistics.add(teacher_nan=sum_N.isnan() | sum_N.isposinf())
        params_R = [row.request.params if row.request else None for row in rows]
        params_N = [params for params, n in zip(params_R, num_drafts, strict=True) for _ in range(n)]
        policy = self.policy_of(rows)
        blended = behavior(
            policy,
            params_N,
            logp_student_NV,
            teacher_NV,
            vocabulary=vocabulary,
            temperature_N=temperature_N,
        )

        # The ragged rows as [R, G]; places without a draft repeat the last position, and are never read.
        if not full:
            offset_R = num_drafts_R.cumsum(0) - num_drafts_R
            position_RG = (offset_R.unsqueeze(1) + torch.arange(width, device=device)).clamp(max=sum(num_drafts) - 1)

        def padded(values_N: torch.Tensor) -> torch.Tensor:
            return values_N.unflatten(0, (-1, width)) if full else values_N[position_RG]

        log_mu_RGV = padded(blended.log_mu)
        coupled = couple(drafts_RG, num_drafts_R, logp_student_RGV, log_mu_RGV)

        # Cut where the request ends, so that what is counted is what the rollout keeps.
        emitted_RG = coupled.tokens_BG >= 0
        stop_RG = emitted_RG & (coupled.tokens_BG == vocabulary.student_eos)
        before_stop_RG = stop_RG.cumsum(1) - stop_RG.long() == 0
        remaining_R = torch.tensor([row.remaining for row in rows], device=device)
        within_RG = torch.arange(width, device=device) < remaining_R.unsqueeze(1)
        kept_RG = emitted_RG & before_stop_RG & within_RG
        room_R = (remaining_R - kept_RG.sum(1)).masked_fill((kept_RG & stop_RG).any(1), 0)

        token_RG1 = coupled.tokens_BG.clamp(min=0).unsqueeze(-1)
        logp_student_RG = logp_student_RGV.gather(-1, token_RG1).squeeze(-1)
        draft_RG1 = drafts_RG.unsqueeze(-1)
        log_accept_RG = (log_mu_RGV.gather(-1, draft_RG1) - logp_student_RGV.gather(-1, draft_RG1)).squeeze(-1)
        beta_RG, kl_RG = (padded(x_N).where(kept_RG, 0.0) for x_N in (blended.beta, blended.kl.clamp(max=-LOG_LEAST)))
        log_ratio_RG = coupled.logp_BG - logp_student_RG.clamp(min=LOG_LEAST)
        self.statistics.add(
            tokens=kept_RG,
            verified=kept_RG,
            accepted=kept_RG & coupled.accepted_BG,
            blocks=kept_RG.any(1),
            beta=beta_RG,
            beta_max=beta_RG,
            kl=kl_RG,
            kl_max=kl_RG,
            # E over drafts of 1 − min(1, μ/π_S) is the total variation, without another pass over V.
            tv=(1 - log_accept_RG.clamp(max=0).exp()).where(kept_RG, 0.0),
            log_ratio=log_ratio_RG.where(kept_RG, 0.0),
        )
        self.traces.add(
            [row.request.trace if row.request else None for row in rows],
            kept_RG,
            tokens=coupled.tokens_BG,
            corrected=~coupled.accepted_BG,
            drafts=drafts_RG,
            logp_student=logp_student_RG.clamp(min=LOG_LEAST),
            log_mu=coupled.logp_BG,
        )
        keep_R = [row.request.keep if row.request is not None else None for row in rows]
        if teacher_NV is not None and (k := next((k for _, k in filter(None, keep_R)), None)) is not None:
            columns_NC = hidden_NE
            if k != HIDDEN_STATES:
                logp_teacher_NV = teacher_logprobs(teacher_NV, vocabulary, temperature_N)
                token_RG = coupled.tokens_BG.clamp(min=0)
                token_N = token_RG.flatten() if full else token_RG[drafted_RG]
                columns_NC = verified(logp_student_NV, logp_teacher_NV, token_N, k).packed()
            self.kept.add([None if keep is None else keep[0] for keep in keep_R], kept_RG, padded(columns_NC))
        logp_RG = coupled.logp_BG
        if policy.marks_corrections:
            logp_RG = mark_corrections(logp_RG, emitted_RG & ~coupled.accepted_BG)
        return coupled.tokens_BG.where(kept_RG, PLACEHOLDER_TOKEN_ID), logp_RG.where(kept_RG, 0.0), room_R


def _output(tokens: torch.Tensor, logp: torch.Tensor) -> SamplerOutput:
    """vLLM's output for token ids and log μ of one shape [B, columns]; −1 marks an unused column."""
    ids = tokens.clamp(min=0).reshape(-1, 1)
    return SamplerOutput(
        sampled_token_ids=tokens.to(torch.int32),
        logprobs_tensors=LogprobsTensors(
            logprob_token_ids=ids.to(torch.int32),
            logprobs=logp.reshape(-1, 1).float(),
            selected_token_ranks=torch.zeros_like(ids[:, 0], dtype=torch.int32),
        ),
    )


class BareSampler(Sampler):
    """Stands where vLLM samples a batch without scheduled drafts: prefills, and blocks of one draft."""

    def __init__(self, original: Sampler, sampling: BlendedSampling) -> None:
        super().__init__(logprobs_mode=original.logprobs_mode)
        self.sampling = sampling

    def forward(self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, *args: Any, **kwargs: Any):
        return self.sampling.draw([0] * len(logits), logits, sampling_metadata)


class BehaviorSampler(RejectionSampler):
    """Stands where vLLM verifies drafts."""

    def __init__(self, original: RejectionSampler, sampling: BlendedSampling) -> None:
        super().__init__(original.sampler)
        self.sampling = sampling

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        return self.sampling.draw(metadata.num_draft_tokens, logits, sampling_metadata)
