"""The loss that verl's training worker calls for each micro-batch, from the columns of head.py.

`full` and `topk` average the distillation loss over response tokens; `sampled` is verl's policy gradient with
the reverse-KL advantage (advantage.py).
"""

from typing import Any

import torch
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import no_padding_2_padding

MEANS = ("reverse_kl", "student_entropy", "teacher_entropy")


class DistillationLoss:
    """Callable with verl's loss signature; `mode` is `trb.loss`, `actor_config` verl's."""

    def __init__(self, actor_config: Any, mode: str) -> None:
        self.actor_config, self.mode = actor_config, mode

    def __call__(
        self, model_output: dict[str, Any], data: TensorDict, dp_group: Any = None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        if "loss" not in model_output:  # a plain log-probability pass of verl's
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
        if self.mode == "sampled":
            loss, metrics = ppo_loss(config, {"log_probs": model_output["log_probs"]}, data, dp_group)
        else:
            loss, metrics = over_batch(columns["loss"], config.loss_agg_mode), {}

        monitored = {name: columns[name].detach() for name in MEANS}
        monitored["teacher_logprob"] = columns["teacher_log_probs"].detach()
        if "rollout_log_probs" in data:
            log_mu_BT = data["rollout_log_probs"].to_padded_tensor(0.0)
            monitored["log_ratio"] = log_mu_BT - columns["log_probs"].detach()
        # Sums over micro-batches of shares of the whole mini-batch: their sum is the mean per token.
        for name, values_BT in monitored.items():
            metrics[name] = Metric(AggregationType.SUM, over_batch(values_BT, "token-mean"))
        return loss, metrics
