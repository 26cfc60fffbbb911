"""The loss that verl's training worker calls for each micro-batch: distillation and reward, each with its weight.

Distillation is the mean of head.py's `loss` column over response tokens, or with `trb.loss=sampled` verl's policy
gradient of the divergence's advantages (advantage.py). The reward term is verl's `ppo_loss`, whatever it contains.
"""

from typing import Any

import torch
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import no_padding_2_padding

from verl_trb.objective import Objective

# Set in a batch's extra_info by our trainer: the step's `Objective` as a dictionary.
OBJECTIVE = "trb_objective"
# The batch's field for the advantages of `trb.loss=sampled`, beside verl's own.
ADVANTAGES = "distill_advantages"
MEANS = ("reverse_kl", "student_entropy", "teacher_entropy")


def objective_of(data: TensorDict) -> Objective | None:
    """What our trainer asked of this batch; None for a batch of verl's own."""
    asked = tu.get_non_tensor_data(data=data, key=OBJECTIVE, default=None)
    return None if asked is None else Objective(**asked)


class DistillationLoss:
    """Callable with verl's loss signature; `actor_config` is verl's."""

    def __init__(self, actor_config: Any) -> None:
        self.actor_config = actor_config

    def __call__(
        self, model_output: dict[str, Any], data: TensorDict, dp_group: Any = None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        objective = objective_of(data)
        if objective is None:  # a plain log-probability pass of verl's
            return ppo_loss(self.actor_config, model_output, data, dp_group)
        config = self.actor_config
        mask_BT = data["response_mask"].to_padded_tensor(0).bool()
        scale = {
            "dp_size": data["dp_size"],
            "batch_num_tokens": data["batch_num_tokens"],
            "global_batch_size": data["global_batch_size"],
            "loss_scale_factor": config.loss_scale_factor,
        }

        def over_batch(values_BT: torch.Tensor, mode: str) -> torch.Tensor:
            return agg_loss(loss_mat=values_BT, loss_mask=mask_BT, loss_agg_mode=mode, **scale)

        columns = {name: no_padding_2_padding(values, data) for name, values in model_output.items()}
        terms, metrics = [], {}
        if objective.reward_weight > 0:
            reward, metrics = ppo_loss(config, {"log_probs": model_output["log_probs"]}, data, dp_group)
            terms.append(objective.reward_weight * reward)
        if objective.samples:
            config.global_batch_info.update(scale)
            distillation, _ = get_policy_loss_fn(config.policy_loss.get("loss_mode", "vanilla"))(
                old_log_prob=data["old_log_probs"].to_padded_tensor(0.0),
                log_prob=columns["log_probs"],
                advantages=data[ADVANTAGES].to_padded_tensor(0.0),
                response_mask=mask_BT,
                loss_agg_mode=config.loss_agg_mode,
                config=config,
                rollout_is_weights=None,  # the advantages have them
            )
            terms.append(objective.distill_weight * distillation)
        elif objective.distills:
            terms.append(objective.distill_weight * over_batch(columns["loss"], config.loss_agg_mode))

        monitored = {name: columns[name].detach() for name in MEANS if name in columns}
        if "teacher_log_probs" in columns:
            monitored["teacher_logprob"] = columns["teacher_log_probs"].detach()
        if "rollout_log_probs" in data:
            log_mu_BT = data["rollout_log_probs"].to_padded_tensor(0.0)
            monitored["log_ratio"] = log_mu_BT - columns["log_probs"].detach()
        # Sums over micro-batches of shares of the whole mini-batch: their sum is the mean per token.
        for name, values_BT in monitored.items():
            metrics[name] = Metric(AggregationType.SUM, over_batch(values_BT, "token-mean"))
        return torch.stack(terms).sum(), metrics
