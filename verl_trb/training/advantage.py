"""`trb.loss=sampled`: the reverse KL as an advantage of the sampled token, registered with verl as `trb_reverse_kl`."""

from typing import Any

import torch
from verl.trainer.ppo.core_algos import register_adv_est

from verl_trb.divergences import sampled_advantage

NAME = "trb_reverse_kl"


@register_adv_est(NAME)
def reverse_kl_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    config: Any = None,
    *,
    logp_student: torch.Tensor,
    logp_teacher: torch.Tensor,
    logp_behavior: torch.Tensor,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """verl's estimator interface; all tensors are [B, T]. Rewards are monitored, not trained on.

    Returns:
        advantages and returns, both π_S/μ · (log π_T − log π_S): see `sampled_advantage`.
    """
    advantages = sampled_advantage(logp_student, logp_teacher, logp_behavior, response_mask)
    return advantages, advantages
