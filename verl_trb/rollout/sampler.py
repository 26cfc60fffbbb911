"""The sampler that replaces vLLM's: exact draws from the behavior policy μ out of the student's drafts.

    draft z ~ π_S  →  policy(log π_S, log π_T) = log μ  →  keep z with probability min(1, μ(z)/π_S(z)),
    else draw from (μ − π_S)₊ and drop the rest of the block.

There is no bonus token (the student's distribution after the last draft is unknown), and a row without drafts
is never sampled: it gets its forced first token, or the marker that ends the request so that the server can
resubmit it. A row whose request has no parameters is not guided: its μ is π_S, bitwise, whatever the policy.

Where the policy asks for it (`marks_corrections`), the log-probability of a correction, a token that replaced a
rejected draft, is returned with a positive sign. verl's agent loops align, cut and pad log-probabilities with their
tokens over any number of turns, so the mark stays with its token; training/agent_loop.py takes it off again.

Shapes: B requests of the batch, R of them with drafts, G drafts a block (γ), N = Σ drafts, V vocabulary.
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
from verl_trb.policies import Policy, behavior, get_policy
from verl_trb.rollout.request import BlendedRequest
from verl_trb.rollout.statistics import RolloutStatistics
from verl_trb.rollout.teacher_gate import TeacherGate
from verl_trb.rollout.trace import Traces
from verl_trb.vocabulary import SharedVocabulary

# The logarithm of the smallest float32, which stands in the statistics for probabilities that underflowed to 0.
LOG_LEAST = math.log(2.0**-149)


@dataclass
class Row:
    """One request of the batch: its settings, how many tokens it has so far and how many it may still get.

    student_GV: π_S at each of its drafts, or None where vLLM holds none for it.
    """

    request: BlendedRequest | None
    generated: int
    remaining: int
    student_GV: torch.Tensor | None


@dataclass
class BlendedSampling:
    """What both samplers need: the rule, the vocabulary, and a view of the runner's requests."""

    rows: Callable[[], list[Row]]
    policy: Policy
    vocabulary: SharedVocabulary
    statistics: RolloutStatistics
    gate: TeacherGate
    traces: Traces = field(default_factory=Traces)

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


class ForcedTokenSampler(Sampler):
    """Stands where vLLM samples a batch without drafts (prefills): nothing is drawn from the teacher."""

    def __init__(self, original: Sampler, sampling: BlendedSampling) -> None:
        super().__init__(logprobs_mode=original.logprobs_mode)
        self.sampling = sampling

    def forward(self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, *args: Any, **kwargs: Any):
        tokens = [self.sampling.token_without_draft(row) for row in self.sampling.rows()]
        tokens_B1 = torch.tensor(tokens, device=logits.device).unsqueeze(1)
        return _output(tokens_B1, torch.zeros(tokens_B1.shape, device=logits.device))


class BehaviorSampler(RejectionSampler):
    """vLLM's rejection sampler with the acceptance rule of the behavior policy."""

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
        rows = self.sampling.rows()
        device = logits.device
        # vLLM's `draft_probs` is None for the whole batch as soon as one row has none: a request, say, that joins
        # the batch with all but one token cached, and is padded with placeholder drafts. Ask row by row instead.
        pairs = zip(metadata.num_draft_tokens, rows, strict=True)
        drafted = [n if row.request is not None and row.student_GV is not None else 0 for n, row in pairs]
        columns = metadata.max_spec_len + 1
        tokens_BC = torch.full((len(rows), columns), PLACEHOLDER_TOKEN_ID, dtype=torch.long, device=device)
        logp_BC = torch.zeros((len(rows), columns), dtype=torch.float32, device=device)

        bare = [i for i, n in enumerate(drafted) if n == 0]
        if bare:
            forced = [self.sampling.token_without_draft(rows[i]) for i in bare]
            tokens_BC[bare, 0] = torch.tensor(forced, device=device)

        index_R = [i for i, n in enumerate(drafted) if n > 0]
        if index_R:
            known = [rows[i] for i in index_R], [drafted[i] for i in index_R]
            tokens_RG, logp_RG = self._verify(*known, index_R, metadata, logits, sampling_metadata)
            tokens_BC[index_R, : tokens_RG.shape[1]] = tokens_RG
            logp_BC[index_R, : logp_RG.shape[1]] = logp_RG
        return _output(tokens_BC, logp_BC)

    def _verify(
        self,
        rows: list[Row],
        num_drafts: list[int],
        index_R: list[int],
        metadata: SpecDecodeMetadata,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [R, G] (−1: none) and their log μ for the rows that have drafts, `index_R` of the batch."""
        device = logits.device
        vocabulary = self.sampling.vocabulary
        num_drafts_R = torch.tensor(num_drafts, device=device)

        student = [row.student_GV[:n] for row, n in zip(rows, num_drafts, strict=True) if row.student_GV is not None]
        student_NV = torch.cat(student)
        logp_student_NV = student_NV[:, : vocabulary.size].log()
        drafts_N, target_N = metadata.draft_token_ids.long(), metadata.target_logits_indices
        if len(student_NV) < len(drafts_N):  # in between lie drafts of rows without π_S
            drafts_B = torch.tensor(metadata.num_draft_tokens, device=device)
            known_B = torch.zeros_like(drafts_B, dtype=torch.bool)
            known_B[index_R] = True
            known_N = known_B.repeat_interleave(drafts_B)
            drafts_N, target_N = drafts_N[known_N], target_N[known_N]
        temperature_N = None
        if sampling_metadata.temperature is not None:
            temperature_N = sampling_metadata.temperature[index_R].repeat_interleave(num_drafts_R)
        teacher_NV = None if self.sampling.gate.skipped else logits[target_N]
        self.sampling.statistics.add(student_nan=student_NV.sum(-1).isnan())  # a sum is NaN where a term is
        if teacher_NV is not None:
            sum_N = teacher_NV.sum(-1, dtype=torch.float32)
            self.sampling.statistics.add(teacher_nan=sum_N.isnan() | sum_N.isposinf())
        params_R = [row.request.params if row.request else None for row in rows]
        params_N = [params for params, n in zip(params_R, num_drafts, strict=True) for _ in range(n)]
        policy = self.sampling.policy_of(rows)
        blended = behavior(
            policy,
            params_N,
            logp_student_NV,
            teacher_NV,
            vocabulary=vocabulary,
            temperature_N=temperature_N,
        )

        # Padded [R, G] view of the ragged rows; usually every block is full and nothing is copied.
        width = max(num_drafts)
        full = len(set(num_drafts)) == 1
        if not full:
            offset_R = num_drafts_R.cumsum(0) - num_drafts_R
            column_G = torch.arange(width, device=device)
            position_RG = (offset_R.unsqueeze(1) + column_G).clamp(max=drafts_N.numel() - 1)

        def padded(values_N: torch.Tensor) -> torch.Tensor:
            return values_N.unflatten(0, (-1, width)) if full else values_N[position_RG]

        drafts_RG = padded(drafts_N)
        logp_student_RGV, log_mu_RGV = padded(logp_student_NV), padded(blended.log_mu)
        coupled = couple(drafts_RG, num_drafts_R, logp_student_RGV, log_mu_RGV)

        # Cut where the request ends, so that what is counted is what the rollout keeps.
        emitted_RG = coupled.tokens_BG >= 0
        stop_RG = emitted_RG & (coupled.tokens_BG == vocabulary.student_eos)
        before_stop_RG = stop_RG.cumsum(1) - stop_RG.long() == 0
        remaining_R = torch.tensor([row.remaining for row in rows], device=device)
        within_RG = torch.arange(width, device=device) < remaining_R.unsqueeze(1)
        kept_RG = emitted_RG & before_stop_RG & within_RG

        token_RG1 = coupled.tokens_BG.clamp(min=0).unsqueeze(-1)
        logp_student_RG = logp_student_RGV.gather(-1, token_RG1).squeeze(-1)
        draft_RG1 = drafts_RG.unsqueeze(-1)
        log_accept_RG = (log_mu_RGV.gather(-1, draft_RG1) - logp_student_RGV.gather(-1, draft_RG1)).squeeze(-1)
        beta_RG, kl_RG = padded(blended.beta), padded(blended.kl).clamp(max=-LOG_LEAST)
        self.sampling.statistics.add(
            tokens=kept_RG,
            verified=kept_RG,
            accepted=kept_RG & coupled.accepted_BG,
            blocks=kept_RG.any(1),
            beta=beta_RG[kept_RG],
            beta_max=beta_RG[kept_RG],
            kl=kl_RG[kept_RG],
            kl_max=kl_RG[kept_RG],
            # E over drafts of 1 − min(1, μ/π_S) is the total variation, without another pass over V.
            tv=1 - log_accept_RG[kept_RG].clamp(max=0).exp(),
            log_ratio=(coupled.logp_BG - logp_student_RG.clamp(min=LOG_LEAST))[kept_RG],
        )
        self.sampling.traces.add(
            [row.request.trace if row.request else None for row in rows],
            kept_RG,
            tokens=coupled.tokens_BG,
            corrected=~coupled.accepted_BG,
            drafts=drafts_RG,
            logp_student=logp_student_RG.clamp(min=LOG_LEAST),
            log_mu=coupled.logp_BG,
        )
        logp_RG = coupled.logp_BG
        if policy.marks_corrections:
            logp_RG = mark_corrections(logp_RG, emitted_RG & ~coupled.accepted_BG)
        return coupled.tokens_BG.where(kept_RG, PLACEHOLDER_TOKEN_ID), logp_RG.where(kept_RG, 0.0)
