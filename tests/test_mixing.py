"""Distillation and reward in one loss: the worker's loss term by term, and the reward term's estimator."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import t as student_t
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.ppo.core_algos import compute_rloo_outcome_advantage, get_policy_loss_fn
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig
from verl.workers.utils.losses import ppo_loss

from verl_trb.objective import Objective
from verl_trb.training.advantage import distillation_advantages
from verl_trb.training.loss import ADVANTAGES, OBJECTIVE, DistillationLoss
from verl_trb.trust_region import blend

PROMPT, LENGTHS = 2, (3, 1)
COLUMNS = ("loss", "log_probs", "reverse_kl", "student_entropy", "teacher_entropy", "teacher_log_probs")


def actor(**settings: Any) -> ActorConfig:
    return ActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **settings)


def jagged(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def batch(objective: Objective | None) -> TensorDict:
    """Two prompts of 2 tokens with answers of 3 and 1; the middle token of the first is masked."""
    g = torch.Generator().manual_seed(0)
    fields = {name: [torch.randn(n, generator=g) for n in LENGTHS] for name in ("advantages", ADVANTAGES)}
    fields |= {name: [-torch.rand(n, generator=g) for n in LENGTHS] for name in ("old_log_probs", "rollout_log_probs")}
    fields["rollout_is_weights"] = [torch.rand(n, generator=g) for n in LENGTHS]
    fields["response_mask"] = [torch.tensor([1, 0, 1]), torch.tensor([1])]
    fields["prompts"] = [torch.zeros(PROMPT, dtype=torch.long) for _ in LENGTHS]
    fields["responses"] = [torch.zeros(n, dtype=torch.long) for n in LENGTHS]
    data = TensorDict({name: jagged(rows) for name, rows in fields.items()}, batch_size=len(LENGTHS))
    tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=3, global_batch_size=2)
    if objective is not None:
        tu.assign_non_tensor(data, **{OBJECTIVE: objective.as_dict()})
    return data


def model_output(names: tuple[str, ...] = COLUMNS) -> dict[str, Tensor]:
    """A column is 0 where nothing is predicted, as head.py gives it."""
    g = torch.Generator().manual_seed(1)
    rows = {name: [torch.randn(PROMPT + n, generator=g) for n in LENGTHS] for name in names}
    return {name: jagged(values).requires_grad_() for name, values in rows.items()}


def gradient(loss: Tensor, output: dict[str, Tensor], name: str) -> Tensor:
    (grad,) = torch.autograd.grad(loss, output[name], retain_graph=True, allow_unused=True)
    return torch.zeros_like(output[name].values()) if grad is None else grad.values()


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.5, 0.0), (0.7, 1.3)])
def test_full_loss_is_the_weighted_sum(weights: tuple[float, float]):
    objective = Objective("jsd", "full", {}, *weights)
    data, output = batch(objective), model_output()
    loss, metrics = DistillationLoss(actor())(output, data)
    # Of a sequence's last n + 1 places all but the last predict its answer.
    values = output["loss"].values()
    column = (values[1] + values[3] + values[6]) / 3  # the mean over the tokens that count
    reward, _ = ppo_loss(actor(), {"log_probs": output["log_probs"]}, data)
    torch.testing.assert_close(loss, weights[0] * column + weights[1] * reward)
    for name, exact in (("loss", weights[0] * column), ("log_probs", weights[1] * reward)):
        torch.testing.assert_close(gradient(loss, output, name), gradient(exact, output, name))
    assert metrics.keys() >= {"reverse_kl", "student_entropy", "teacher_entropy", "teacher_logprob", "log_ratio"}


def test_sampled_distillation_has_advantages_of_its_own():
    """Weighted already: verl's importance weights are for the reward only."""
    data, output = batch(Objective("reverse_kl", "sampled", {}, 0.7, 1.3)), model_output()
    loss, _ = DistillationLoss(actor())(output, data)
    distill = batch(None)
    distill["advantages"] = data[ADVANTAGES]
    del distill["rollout_is_weights"]
    term, _ = ppo_loss(actor(), {"log_probs": output["log_probs"]}, distill)
    reward, _ = ppo_loss(actor(), {"log_probs": output["log_probs"]}, data)
    torch.testing.assert_close(loss, 0.7 * term + 1.3 * reward)
    unweighted = batch(None)
    del unweighted["rollout_is_weights"]
    assert abs(ppo_loss(actor(), {"log_probs": output["log_probs"]}, unweighted)[0] - reward) > 1e-3


def test_reward_alone_needs_no_teacher():
    data, output = batch(Objective("reverse_kl", "full", {}, 0.0, 2.0)), model_output(("log_probs",))
    loss, metrics = DistillationLoss(actor())(output, data)
    reward, _ = ppo_loss(actor(), output, data)
    torch.testing.assert_close(loss, 2 * reward)
    assert "reverse_kl" not in metrics and "log_ratio" in metrics


def test_without_an_objective_the_loss_is_verls():
    output = model_output(("log_probs",))
    loss, _ = DistillationLoss(actor())(output, batch(None))
    torch.testing.assert_close(loss, ppo_loss(actor(), output, batch(None))[0])


def test_distillation_advantages():
    """pi_S / mu (log pi_T - log pi_S) of reverse KL; 0 where the mask is, whatever stands there."""
    s, t, m = (torch.tensor([[a, -torch.inf]]) for a in (-1.0, -3.0, -0.5))
    got = distillation_advantages(Objective("reverse_kl", "sampled", {}, 1, 0), torch.tensor([[1, 0]]), s, t, m)
    torch.testing.assert_close(got, torch.tensor([[np.exp(-0.5).astype(np.float32) * -2.0, 0.0]]))


# ------------------------------------------------------------------------------- the policy gradient off-policy

TOKENS, STEPS, GROUP, GROUPS, PARTS = 3, 3, 4, 500, 40
PREFIXES = [p for n in range(STEPS) for p in itertools.product(range(TOKENS), repeat=n)]
SEQUENCES = list(itertools.product(range(TOKENS), repeat=STEPS))


@pytest.fixture(scope="module")
def world() -> dict[str, Any]:
    """A tabular student and teacher over every prefix of 3 tokens, TRB's mu, a 0/1 reward of whole sequences, and the
    exact on-policy gradient of its mean."""
    g = torch.Generator().manual_seed(0)
    student, teacher = (1.5 * torch.randn(len(PREFIXES), TOKENS, generator=g, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    log_mu = blend(student.detach().log_softmax(-1), teacher.log_softmax(-1), 0.15).log_mu.double()
    places = torch.tensor([[PREFIXES.index(s[:i]) for i in range(STEPS)] for s in SEQUENCES])
    actions = torch.tensor(SEQUENCES)
    reward = (torch.rand(len(SEQUENCES), generator=g) < 0.4).double()
    logp = student.log_softmax(-1)[places, actions].sum(-1)
    (exact,) = torch.autograd.grad((logp.exp() * reward).sum(), student)
    behavior = log_mu[places, actions].sum(-1).exp()
    assert abs(behavior.sum() - 1) < 1e-5
    return {**locals()}


def estimates(world: dict[str, Any], rollout_is: str | None) -> Tensor:
    """PARTS independent estimates of the gradient: verl's RLOO advantages, importance weights and policy loss, on
    rollouts from mu in groups of 4. Sequences are summed over their tokens."""
    g = torch.Generator().manual_seed(1)
    student, found = world["student"], []
    mask = torch.ones(GROUP * GROUPS, STEPS)
    index = np.repeat(np.arange(GROUPS), GROUP)
    for _ in range(PARTS):
        drawn = torch.multinomial(world["behavior"], GROUP * GROUPS, replacement=True, generator=g)
        places, actions = world["places"][drawn], world["actions"][drawn]
        rewards = torch.zeros(GROUP * GROUPS, STEPS, dtype=torch.float64)
        rewards[:, -1] = world["reward"][drawn]
        log_prob = student.log_softmax(-1)[places, actions]
        old, rollout = log_prob.detach(), world["log_mu"][places, actions]
        advantages, _ = compute_rloo_outcome_advantage(rewards, mask, index)
        weights = None
        if rollout_is is not None:
            weights, _ = compute_rollout_correction_weights(old - rollout, mask, rollout_is, 1e9)
        loss, _ = get_policy_loss_fn("vanilla")(old, log_prob, advantages, mask, "seq-mean-token-sum", actor(), weights)
        found.append(-torch.autograd.grad(loss, student)[0].flatten())
    return torch.stack(found)


def deviation(world: dict[str, Any], rollout_is: str | None) -> float:
    """The largest |mean - exact| over the table's entries, in standard errors."""
    found = estimates(world, rollout_is)
    error = found.std(0) / PARTS**0.5
    return float(((found.mean(0) - world["exact"].flatten()).abs() / error).max())


# The largest of 39 t-distributed deviations exceeds it with probability alpha <= 0.001 (Bonferroni).
CRITICAL = float(student_t.ppf(1 - 0.001 / 2 / (len(PREFIXES) * TOKENS), PARTS - 1))


def test_reward_gradient_with_sequence_weights_is_the_on_policy_gradient(world: dict[str, Any]):
    assert deviation(world, "sequence") < CRITICAL < 5


def test_reward_gradient_without_weights_is_biased(world: dict[str, Any]):
    assert deviation(world, None) > 5


def test_token_weights_leave_a_bias(world: dict[str, Any]):
    """They correct the choice of each token, not which prefixes are visited nor how mu goes on: the expected gradient,
    by enumeration, is not the on-policy one."""
    student, places, actions = world["student"], world["places"], world["actions"]
    logp = student.log_softmax(-1)[places, actions]
    log_ratio = logp.detach() - world["log_mu"][places, actions]
    advantage = (world["reward"] - (world["behavior"] * world["reward"]).sum()).unsqueeze(-1)
    bias = {}
    for name, weight in (
        ("sequence", log_ratio.sum(-1, keepdim=True).exp()),
        ("token", log_ratio.exp()),
    ):
        surrogate = (world["behavior"].unsqueeze(-1) * weight * advantage * logp).sum()
        (expected,) = torch.autograd.grad(surrogate, student, retain_graph=True)
        bias[name] = float((expected - world["exact"]).norm() / world["exact"].norm())
    assert bias["sequence"] < 1e-5
    assert bias["token"] > 0.1
