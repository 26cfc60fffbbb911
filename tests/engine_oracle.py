"""What the engine should have done, by Hugging Face models in float64, and statistics that tell if it did.

Nothing of verl_trb is used but the ids of `SharedVocabulary`: the blend is plain bisection.

The main statistic: given its prefix, a token of a rollout is a draw of μ. Its randomized distribution
function under a hypothesis (tokens in the order of log π_T − log π_S, where μ, π_S and π_T differ most) is uniform and
independent of everything before it exactly when the hypothesis is the truth. So the numbers of all tokens of
all rollouts, however long each is and whatever made it stop, are one independent uniform sample.

Shapes: N tokens of all rollouts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from transformers import AutoModelForCausalLM

from verl_trb.rollout.generation import Rollout
from verl_trb.vocabulary import SharedVocabulary


@dataclass(frozen=True)
class Visited:
    """Every token of some rollouts, with what the models say at its prefix.

    rollout_N, position_N: whose token, and its place in the response; token_N; logprob_N: as returned;
    epsilon_N; student_NV, teacher_NV: float64 log-probabilities over the shared vocabulary.
    """

    rollout_N: Tensor
    position_N: Tensor
    token_N: Tensor
    logprob_N: Tensor
    epsilon_N: Tensor
    student_NV: Tensor
    teacher_NV: Tensor

    def where(self, mask_N: Tensor) -> Visited:
        return Visited(*(getattr(self, name)[mask_N] for name in self.__dataclass_fields__))

    def at_token(self, values_NV: Tensor) -> Tensor:
        return values_NV.gather(-1, self.token_N[:, None]).squeeze(-1)


@torch.no_grad()
def next_token_logprobs(
    model: Path | torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    vocabulary: SharedVocabulary,
    *,
    teacher: bool = False,
    temperature: float = 1.0,
) -> Tensor:
    """[N, V] log-probabilities at every token of every response: full forward passes, no cache, float64."""
    if isinstance(model, Path):
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, attn_implementation="eager")
    length = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    rows = []
    for start in range(0, len(prompts), 256):
        chunk = list(zip(prompts[start : start + 256], responses[start : start + 256], strict=True))
        ids = torch.zeros(len(chunk), length, dtype=torch.long)
        for row, (prompt, response) in zip(ids, chunk, strict=True):
            row[: len(prompt) + len(response)] = torch.tensor([*prompt, *response])
        logits = model(input_ids=ids).logits
        for row, (prompt, response) in zip(logits, chunk, strict=True):
            rows.append(row[len(prompt) - 1 : len(prompt) + len(response) - 1])
    return shared_logprobs(torch.cat(rows), vocabulary, teacher=teacher, temperature=temperature)


def shared_logprobs(
    logits_NV: Tensor, vocabulary: SharedVocabulary, *, teacher: bool = False, temperature: float = 1.0
) -> Tensor:
    """[N, V] float64 log-probabilities of what the rollouts may contain."""
    probability = (logits_NV.double() / temperature).softmax(-1)
    if teacher and vocabulary.teacher_eos != vocabulary.student_eos:
        probability[:, vocabulary.student_eos] += probability[:, vocabulary.teacher_eos]
    probability[:, list(vocabulary.masked)] = 0
    return (probability / probability.sum(-1, keepdim=True)).log()


def visit(
    prompts: Sequence[Sequence[int]],
    rollouts: Sequence[Rollout],
    epsilons: Sequence[float],
    student: Path | torch.nn.Module,
    teacher: Path | torch.nn.Module,
    vocabulary: SharedVocabulary,
    temperature: float = 1.0,
) -> Visited:
    responses = [rollout.token_ids for rollout in rollouts]
    lengths = torch.tensor([len(response) for response in responses])
    return Visited(
        rollout_N=torch.arange(len(rollouts)).repeat_interleave(lengths),
        position_N=torch.cat([torch.arange(n) for n in lengths]),
        token_N=torch.tensor([token for response in responses for token in response]),
        logprob_N=torch.tensor([x for rollout in rollouts for x in rollout.logprobs], dtype=torch.float64),
        epsilon_N=torch.tensor(epsilons, dtype=torch.float64).repeat_interleave(lengths),
        student_NV=next_token_logprobs(student, prompts, responses, vocabulary, temperature=temperature),
        teacher_NV=next_token_logprobs(teacher, prompts, responses, vocabulary, teacher=True, temperature=temperature),
    )


def blend_of(student_NV: Tensor, teacher_NV: Tensor, epsilon_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log μ [N, V], β [N] and KL(μ‖π_S) [N] by bisection; ids that are masked are masked in both models."""
    live = student_NV[0] > -torch.inf
    s_NV, t_NV = student_NV[:, live], teacher_NV[:, live]

    def at(beta_N: Tensor) -> tuple[Tensor, Tensor]:
        log_mu_NV = ((1 - beta_N[:, None]) * s_NV + beta_N[:, None] * t_NV).log_softmax(-1)
        return log_mu_NV, (log_mu_NV.exp() * (log_mu_NV - s_NV)).sum(-1)

    low_N, high_N = torch.zeros_like(epsilon_N), torch.ones_like(epsilon_N)
    for _ in range(30):
        middle_N = (low_N + high_N) / 2
        fits_N = at(middle_N)[1] <= epsilon_N
        low_N, high_N = torch.where(fits_N, middle_N, low_N), torch.where(fits_N, high_N, middle_N)
    beta_N = torch.where(at(torch.ones_like(low_N))[1] <= epsilon_N, 1.0, low_N)
    beta_N = torch.where(epsilon_N == 0, 0.0, beta_N)
    log_mu_NV = torch.full_like(student_NV, -torch.inf)
    log_mu_NV[:, live], kl_N = at(beta_N)
    return log_mu_NV, beta_N, kl_N


def check_logprobs(visited: Visited) -> None:
    """Returned log-probabilities are log μ, between its values at the two ends of the solver's tolerance.

    The solver promises a KL within 1e-3 of ε from below, less 1.5e-6; 5e-5 is left to float32 models.
    """
    widest_N = visited.at_token(blend_of(visited.student_NV, visited.teacher_NV, visited.epsilon_N)[0])
    least_N = (visited.epsilon_N * (1 - 1e-3) - 1.5e-6).clamp_min(0)
    narrow_N = visited.at_token(blend_of(visited.student_NV, visited.teacher_NV, least_N)[0])
    assert (visited.logprob_N >= torch.minimum(widest_N, narrow_N) - 5e-5).all()
    assert (visited.logprob_N <= torch.maximum(widest_N, narrow_N) + 5e-5).all()
    assert (visited.logprob_N - widest_N).abs().max() < 2e-3
    assert (visited.logprob_N - widest_N).abs().mean() < 3e-4


def uniforms(visited: Visited, hypothesis_NV: Tensor, seed: int = 0) -> np.ndarray:
    """The randomized distribution function of every token under a hypothesis of log-probabilities."""
    ratio_NV = (visited.teacher_NV - visited.student_NV).nan_to_num(nan=-1e9, neginf=-1e9)
    before_NV = ratio_NV < visited.at_token(ratio_NV)[:, None]
    below_N = hypothesis_NV.exp().masked_fill(~before_NV, 0).sum(-1)
    inside_N = torch.rand(len(below_N), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (below_N + inside_N * visited.at_token(hypothesis_NV).exp()).clamp(0, 1 - 1e-12).numpy()


def p_uniform(u_N: np.ndarray, bins: int = 20) -> float:
    """p-value of Pearson's χ² for uniformity."""
    counts = np.bincount((u_N * bins).astype(int), minlength=bins)
    return float(stats.chisquare(counts).pvalue)


def p_serial(visited: Visited, u_N: np.ndarray, bins: int = 5) -> float:
    """p-value of χ² for successive tokens of a rollout being independent and uniform: bins × bins cells.

    Every second pair, so that no token is in two pairs.
    """
    first = (visited.rollout_N[1:] == visited.rollout_N[:-1]) & (visited.position_N[:-1] % 2 == 0)
    index = first.nonzero().squeeze(-1).numpy()
    cell = (u_N[index] * bins).astype(int) * bins + (u_N[index + 1] * bins).astype(int)
    return float(stats.chisquare(np.bincount(cell, minlength=bins**2)).pvalue)


def p_tokens(visited: Visited, hypothesis_NV: Tensor) -> float:
    """p-value of Pearson's χ² of the counts of all tokens, where all share one prefix and one ε."""
    expected = hypothesis_NV[0].exp().numpy() * len(visited.token_N)
    observed = np.bincount(visited.token_N.numpy(), minlength=len(expected))
    if observed[expected == 0].sum():
        return 0.0
    often = expected >= 5
    observed = np.append(observed[often], observed[~often].sum())
    expected = np.append(expected[often], expected[~often].sum())
    return float(stats.chi2.sf(((observed - expected) ** 2 / expected).sum(), len(expected) - 1))


def z_scores(visited: Visited, hypothesis_NV: Tensor, tokens: Sequence[int]) -> list[float]:
    """For each token a: Σ (1[token = a] − μ(a | prefix)), standardized by its variance given the prefixes."""
    scores = []
    for token in tokens:
        p_N = hypothesis_NV[:, token].exp()
        excess = ((visited.token_N == token).double() - p_N).sum()
        scores.append(float(excess / (p_N * (1 - p_N)).sum().sqrt()))
    return scores
