"""The coupling: an exact rollout of mu out of drafts of the student.

The student drafts a block from pi_S; each draft z is accepted with probability min(1, mu(z) / pi_S(z)); at
the first rejection a token is drawn from (mu - pi_S)+, normalized, and the rest of the block is dropped.
Every emitted token is then distributed exactly as mu at its prefix, and P(rejection) = TV(mu, pi_S), at most
sqrt(epsilon / 2). Unlike in speculative decoding there is no bonus token: pi_S after the last draft, hence
mu, is unknown.

Shapes: B rows, M of them that get a correction, G drafts a block (padded), V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from verl_trb.bits import exp

# Numbers from which a CPU draws a chunk of the vocabulary first; all of its cumulative weights take ten times as long.
MANY, CHUNK = 2**18, 128


class Coupled(NamedTuple):
    """What a block of drafts becomes.

    tokens_BG: int64, the emitted tokens, -1 after the last; num_tokens_B: int64, how many (>= 1 where there
    was a draft, 0 where there was none); logp_BG: float32, log mu of each emitted token, 0 after the last;
    accepted_BG: bool, True where the emitted token is the student's draft.
    """

    tokens_BG: Tensor
    num_tokens_B: Tensor
    logp_BG: Tensor
    accepted_BG: Tensor


@torch.no_grad()
def couple(
    draft_BG: Tensor,
    num_drafts_B: Tensor,
    logp_student_BGV: Tensor,
    log_mu_BGV: Tensor,
    *,
    generator: torch.Generator | None = None,
    uniform_BG: Tensor | None = None,
) -> Coupled:
    """Accept, correct, cut: turn drafts of pi_S into tokens of mu.

    draft_BG: int64 ids drawn from pi_S; anything (also -1) beyond a row's num_drafts_B, which may be 0.
    logp_student_BGV, log_mu_BGV: log-probabilities of the student (the ones the drafts were drawn from) and
      of the rollout policy at each position; anything beyond num_drafts_B. They are only read at G numbers a
      row and at the one rejected position, so the only temporaries of size V are [B, V].
    uniform_BG: the numbers in [0, 1) that decide acceptance, for tests; drawn from `generator` if absent.

    Where mu equals pi_S bitwise the ratio is exactly 1 and every draft is accepted. Raises ValueError for
    shapes that do not fit together.
    """
    if logp_student_BGV.shape != log_mu_BGV.shape or logp_student_BGV.dim() != 3:
        raise ValueError(
            "student and rollout log-probabilities must both be [B, G, V], but are "
            f"{list(logp_student_BGV.shape)} and {list(log_mu_BGV.shape)}."
        )
    rows, length, _ = logp_student_BGV.shape
    if draft_BG.shape != (rows, length) or num_drafts_B.shape != (rows,):
        raise ValueError(
            f"drafts must be [{rows}, {length}] and their numbers [{rows}], but are "
            f"{list(draft_BG.shape)} and {list(num_drafts_B.shape)}."
        )
    device = draft_BG.device
    if uniform_BG is None:
        uniform_BG = torch.rand(rows, length, generator=generator, device=device)

    index_BG = torch.arange(length, device=device).expand(rows, length)
    drafted_BG = index_BG < num_drafts_B[:, None]
    safe_BG1 = draft_BG.masked_fill(~drafted_BG, 0)[..., None]
    log_mu_BG = log_mu_BGV.gather(-1, safe_BG1).squeeze(-1).float()
    logp_student_BG = logp_student_BGV.gather(-1, safe_BG1).squeeze(-1).float()
    # u < 1 always, so a ratio of 1 always accepts; NaN (-inf against -inf) never does.
    good_BG = drafted_BG & (uniform_BG < (log_mu_BG - logp_student_BG).exp())
    num_accepted_B = good_BG.long().cumprod(-1).sum(-1)
    accepted_BG = index_BG < num_accepted_B[:, None]
    corrected_BG = (index_BG == num_accepted_B[:, None]) & drafted_BG  # at most one position a row

    if length > 0:
        row_M = _rows_to_correct(corrected_BG)
        at = row_M, num_accepted_B[row_M].clamp_max(length - 1)
        log_mu_MV = log_mu_BGV[at].float()
        token_M = _correct(log_mu_MV, logp_student_BGV[at].float(), generator)
        logp_M = log_mu_MV.gather(-1, token_M[:, None]).squeeze(-1)
        draft_BG = draft_BG.index_put(at, torch.where(corrected_BG[at], token_M, draft_BG[at]))
        log_mu_BG = log_mu_BG.index_put(at, torch.where(corrected_BG[at], logp_M, log_mu_BG[at]))
    emitted_BG = accepted_BG | corrected_BG
    return Coupled(
        tokens_BG=draft_BG.masked_fill(~emitted_BG, -1),
        num_tokens_B=emitted_BG.sum(-1),
        logp_BG=log_mu_BG.masked_fill(~emitted_BG, 0.0),
        accepted_BG=accepted_BG,
    )


def mark_corrections(logp: Tensor, corrected: Tensor) -> Tensor:
    """Log-probabilities whose sign says which of their tokens are corrections: > 0 there, <= 0 elsewhere.

    logp, corrected: of one shape. |result| is |logp|, but for what rounding leaves above 0 (0, or the smallest normal
    number where corrected).
    """
    logp = logp.clamp(max=0)
    return torch.where(corrected, (-logp).clamp(min=torch.finfo(logp.dtype).tiny), logp)


def _rows_to_correct(corrected_BG: Tensor) -> Tensor:
    """The M rows that get a correction: those with a rejection; on a GPU, which would wait for their number, all."""
    if corrected_BG.device.type == "cpu":
        return corrected_BG.any(-1).nonzero().squeeze(-1)
    return torch.arange(len(corrected_BG), device=corrected_BG.device)


def _correct(log_mu_BV: Tensor, logp_student_BV: Tensor, generator: torch.Generator | None) -> Tensor:
    """One token a row from (mu - pi_S)+, normalized: token_B."""
    mu_BV = exp(log_mu_BV)
    residual_BV = (mu_BV - exp(logp_student_BV)).clamp_min_(0)
    # A rejection means mu < pi_S somewhere, hence mu > pi_S elsewhere by the same mass, TV. It can only round
    # to nothing if TV is below the rounding of the sums, so drawing from mu then changes the law by no more
    # than that.
    empty_B = ~(residual_BV.sum(-1) > 0)
    weight_BV = torch.where(empty_B[:, None], mu_BV, residual_BV)
    return draw(weight_BV, generator)


def draw(weight_BV: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One id a row, int64 [B], in proportion to weights >= 0 that need not add up to 1; never one of weight 0.

    On a CPU by uniform numbers and cumulative weights: an exponential variate a token, the usual way on a GPU, costs
    there as much as a small model's forward pass. Of a large vocabulary first a chunk is drawn, then a token of it.
    A row with NaN gets some id, too.
    """
    if weight_BV.device.type != "cpu":
        # argmax of weight / Exp(1) is such a draw, without normalizing.
        clock_BV = torch.empty_like(weight_BV).exponential_(generator=generator)
        return (weight_BV / clock_BV.clamp_min_(torch.finfo(clock_BV.dtype).tiny)).argmax(-1)
    size = weight_BV.shape[-1]
    if weight_BV.numel() < MANY or size < 8 * CHUNK:
        return _draw_cumulative(weight_BV, generator).squeeze(-1)
    whole = size // CHUNK * CHUNK
    sum_BK = weight_BV[:, :whole].unflatten(-1, (-1, CHUNK)).sum(-1)
    if whole < size:
        sum_BK = torch.cat([sum_BK, weight_BV[:, whole:].sum(-1, keepdim=True)], -1)
    token_BC = CHUNK * _draw_cumulative(sum_BK, generator) + torch.arange(CHUNK)
    chunk_BC = weight_BV.gather(-1, token_BC.clamp(max=size - 1))
    if whole < size:
        chunk_BC = chunk_BC.where(token_BC < size, 0)
    return token_BC.gather(-1, _draw_cumulative(chunk_BC, generator)).squeeze(-1)


def _draw_cumulative(weight_BV: Tensor, generator: torch.Generator | None) -> Tensor:
    """[B, 1] ids; 0 in a row with NaN."""
    sum_BV = weight_BV.cumsum(-1, dtype=torch.float64)
    uniform_B1 = torch.rand(len(sum_BV), 1, dtype=torch.float64, generator=generator)
    token_B1 = torch.searchsorted(sum_BV, uniform_B1 * sum_BV[:, -1:], right=True)
    return token_B1.where(token_B1 < weight_BV.shape[-1], 0)
