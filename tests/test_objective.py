"""The objective of a step: from the settings, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from verl_trb.config import trb_config
from verl_trb.errors import ConfigError, UserError
from verl_trb.objective import (
    Objective,
    check_objective,
    describe_objective,
    objective_metrics,
    reused_of_teacher,
    step_objective,
)
from verl_trb.parameters import Parameter, check_value, value_at
from verl_trb.setting_checks import check_objective as check_settings


def trb(**values: Any) -> Any:
    return trb_config(OmegaConf.create({"trb": values}))


def test_default_is_exact_reverse_kl():
    objective = step_objective(trb(), 1)
    assert objective == Objective("reverse_kl", "full", {}, 1.0, 0.0)
    assert objective.distills and not objective.samples and not objective.policy_gradient


def test_parameters_and_weights_follow_the_step():
    settings = trb(
        divergence="veto",
        loss="topk",
        divergence_params={"beta": [[1, 0.8], [5, 0.0]]},
        distill_weight=[[4, 1], [6, 0]],
        reward_weight=[[4, 0], [6, 2]],
    )
    steps = {step: step_objective(settings, step) for step in range(1, 9)}
    assert [steps[k].params["beta"] for k in (1, 2, 5, 8)] == pytest.approx([0.8, 0.6, 0.0, 0.0])
    assert [steps[k].distill_weight for k in (1, 4, 5, 6, 8)] == [1, 1, 0.5, 0, 0]
    assert [steps[k].reward_weight for k in (1, 4, 5, 6, 8)] == [0, 0, 1, 2, 2]
    assert [steps[k].policy_gradient for k in (1, 4, 5, 6)] == [False, False, True, True]
    assert not steps[6].distills and steps[5].distills and not steps[5].samples
    assert objective_metrics(steps[2])["trb/loss_param/beta"] == pytest.approx(0.6)


def test_defaults_of_parameters_are_filled_in():
    assert step_objective(trb(divergence="eopd"), 3).params == {"threshold": 0.8, "weight": 1.0}


def test_supervised_steps_come_first():
    settings = trb(sft_steps=2, loss="sampled", divergence="jsd")
    assert [step_objective(settings, k).divergence for k in (1, 2, 3)] == ["cross_entropy", "cross_entropy", "jsd"]
    assert not step_objective(settings, 2).samples and step_objective(settings, 3).samples


def test_single_samples_need_no_teacher_once_their_weight_is_0():
    settings = trb(loss="sampled", distill_weight=[[1, 1], [3, 0]], reward_weight=1)
    assert step_objective(settings, 2).samples and not step_objective(settings, 3).samples


def test_description():
    assert describe_objective(trb()) == "reverse KL, full"
    settings = trb(divergence="jsd", divergence_params={"beta": [[1, 0.9], [9, 0.1]]}, sft_steps=3)
    first = "cross-entropy for 3 steps, then jsd, beta = 0.9 at step 1 → 0.1 at step 9, full"
    assert describe_objective(settings) == first
    mixed = trb(reward_weight=[[4, 0], [9, 0.5]])
    assert describe_objective(mixed) == "reverse KL, full; weight 1; reward weight 0 at step 4 → 0.5 at step 9"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"divergence": "reverse"}, "did you mean 'reverse_kl'"),
        (
            {"divergence": "jsd", "loss": "topk"},
            "trb.divergence=jsd is not defined for trb.loss=topk; set trb.loss=full",
        ),
        ({"divergence": "exopd"}, "set trb.loss=sampled"),
        ({"divergence": "veto", "divergence_params": {"bta": 1}}, "did you mean beta?"),
        ({"divergence_params": {"beta": 1}}, "has no such parameter; it takes none"),
        ({"reuse_verification": True, "data_share": [[1, 0.5], [9, 0]]}, "needs trb.data_share=0"),
        ({"reuse_verification": True, "policy": "student"}, "verifies nothing with the teacher"),
        (
            {"divergence": "jsd", "divergence_params": {"beta": 1}},
            "beta must be a number strictly between 0 and 1, got 1",
        ),
        (
            {"divergence": "veto", "divergence_params": {"beta": [[1, 0.5], [1, 0]]}},
            "steps of a schedule must increase",
        ),
        ({"divergence": "veto", "divergence_params": {"beta": [0.5, 0]}}, "a list of [step, value] points"),
        ({"divergence": "veto", "divergence_params": {"beta": "high"}}, "must be a number between 0 and 1, got 'high'"),
    ],
)
def test_wrong_divergence_is_one_sentence(values: dict[str, Any], says: str):
    with pytest.raises(ValueError) as refused:
        check_objective(trb(**values))
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_verification_is_reused_where_rollouts_are_guided_and_distilled_from():
    def reused(**values: Any) -> list[int | None]:
        values = {"reuse_verification": True, "loss": "topk", "topk": 8, **values}
        return [reused_of_teacher(trb(warmup_steps=3, **values), step) for step in range(1, 5)]

    assert reused(reuse_verification=False) == [None] * 4
    assert reused() == [8, 8, 8, None]
    assert reused(loss="full") == reused(loss="sampled") == reused(divergence="forward_kl") == [0, 0, 0, None]
    assert reused(sft_steps=2) == [0, 0, 8, None], "cross-entropy takes the whole vocabulary"
    assert reused(distill_weight=[[2, 1], [3, 0]], reward_weight=1) == [8, 8, None, None]
    assert reused(policy="teacher", guided_steps=2) == [8, 8, None, None]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"sft_steps": -1}, "trb.sft_steps must be >= 0"),
        ({"distill_weight": -1}, "trb.distill_weight must be a number >= 0, got -1"),
        ({"reward_weight": [[1, 0], [5, -2]]}, "trb.reward_weight must be a number >= 0, got -2"),
        ({"reward_weight": "none"}, "trb.reward_weight must be a number >= 0, got 'none'"),
        ({"distill_weight": 0}, "both 0 at step 1: nothing is trained"),
        ({"distill_weight": [[1, 1], [7, 0]], "reward_weight": [[7, 0], [9, 1]]}, "both 0 at step 7"),
        ({"sft_steps": 4, "reward_weight": [[2, 0], [4, 1]]}, "trb.reward_weight is 0.5 at step 3"),
    ],
)
def test_wrong_weight_is_one_sentence(values: dict[str, Any], says: str):
    with pytest.raises(ConfigError) as refused:
        trb(**values)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def settings(rollout_is: str | None = "sequence", actor: dict[str, Any] | None = None, **values: Any) -> DictConfig:
    """The parts of a whole configuration that the check looks at."""
    return OmegaConf.create(
        {
            "trb": {**vars(trb(**values))},
            "actor_rollout_ref": {"actor": {"entropy_coeff": 0, "use_kl_loss": False} | (actor or {})},
            "algorithm": {"rollout_correction": {"rollout_is": rollout_is}},
        }
    )


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (settings(divergence="saki"), "set trb.policy=saki"),
        (settings(loss="sampled", policy="teacher"), "trb.policy=teacher makes useless"),
        (settings(loss="sampled", data_share=0.5), "needs tokens of a known distribution"),
        (settings(reward_weight=1, policy="skd"), "trb.reward_weight > 0 weights every rollout token"),
        (settings(reward_weight=1, rollout_is=None), "is biased without importance weights"),
        (settings(reward_weight=1, actor={"entropy_coeff": 0.01}), "entropy_coeff=0.01 would do nothing"),
        (settings(divergence="exopd", loss="sampled"), "use_kl_loss=true"),
    ],
)
def test_settings_that_contradict_each_other(config: DictConfig, says: str):
    with pytest.raises(UserError) as refused:
        check_settings(config)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_settings_that_fit():
    check_settings(settings())
    check_settings(settings(reward_weight=1))
    check_settings(settings(divergence="saki", policy="saki"))
    check_settings(settings(policy="student", reward_weight=1, rollout_is=None))
    check_settings(settings(divergence="exopd", loss="sampled", actor={"use_kl_loss": True}))


def test_values():
    assert value_at(2, 7) == 2.0 and value_at([[1, 0], [3, 1]], 2) == 0.5
    for value in (True, None, [], [[1, 2, 3]], float("nan"), float("inf")):
        with pytest.raises(ValueError, match="^key"):
            check_value("key", value, Parameter())
    assert str(Parameter(0)) == "a number >= 0" and str(Parameter(0, above=True)) == "a number > 0"
    assert str(Parameter()) == "a number"
