"""`trb.loss=sampled`: the divergence as advantages of the rollout tokens, for verl's policy gradient."""

import torch

from verl_trb.divergences import Prefixes, get_divergence, sampled_advantage
from verl_trb.objective import Objective


def distillation_advantages(
    objective: Objective,
    mask_BT: torch.Tensor,
    logp_student_BT: torch.Tensor,
    logp_teacher_BT: torch.Tensor,
    logp_behavior_BT: torch.Tensor,
    logp_reference_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Advantages [B, T], weighted by pi_S/mu: see `sampled_advantage`. 0 where the mask is 0; no gradient.

    The log-probabilities of the rollout tokens: the student's before the update, the teacher's, log mu, and the
    reference model's for a divergence that needs it.
    """
    keep_BT = mask_BT.bool()

    def kept(logp_BT: torch.Tensor) -> torch.Tensor:
        return logp_BT[keep_BT].float().unsqueeze(-1)

    prefixes = Prefixes(
        kept(logp_student_BT),
        kept(logp_teacher_BT),
        logp_reference_CV=None if logp_reference_BT is None else kept(logp_reference_BT),
    )
    rule = get_divergence(objective.divergence).rule(objective.mode, 0, objective.params)
    advantages_BT = torch.zeros_like(logp_student_BT, dtype=torch.float32)
    advantages_BT[keep_BT] = sampled_advantage(rule, prefixes, logp_behavior_BT[keep_BT].float())
    return advantages_BT
