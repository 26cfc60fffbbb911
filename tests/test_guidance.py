"""From settings to the guidance of a step: schedules, defaults, when it ends; and everything that is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import ToyRun
from omegaconf import OmegaConf

from verl_trb.config import TrbConfig, trb_config
from verl_trb.guidance import (
    check_guidance,
    check_vocabulary,
    describe,
    guidance,
    guidance_metrics,
    last_teacher_step,
    step_policy,
)
from verl_trb.schedules import annealed_epsilon


def settings(**values: Any) -> TrbConfig:
    return trb_config(OmegaConf.create({"trb": values}))


def over_steps(trb: Any, count: int) -> list[dict[str, float] | None]:
    return [guidance(trb, step) for step in range(1, count + 1)]


@pytest.mark.parametrize("policy", ["trb", "saki"])
def test_the_trust_region_is_annealed_over_the_warmup(policy: str):
    trb = settings(policy=policy, epsilon=0.04, warmup_steps=4)
    expected = [{"epsilon": annealed_epsilon(step, 0.04, 4)} for step in range(1, 5)]
    assert over_steps(trb, 6) == [*expected, None, None]
    assert expected[0] == {"epsilon": 0.04}


def test_a_fixed_epsilon_stays():
    assert over_steps(settings(policy="fixed_epsilon", epsilon=0.04, warmup_steps=2), 4) == [{"epsilon": 0.04}] * 4


@pytest.mark.parametrize(
    ("values", "last"),
    [
        ({"policy": "trb", "warmup_steps": 3}, 3),
        ({"policy": "trb", "warmup_steps": 30}, 9),  # of 9 steps
        ({"policy": "trb", "epsilon": 0}, 0),
        ({"policy": "trb", "policy_params": {"epsilon": [[1, 0.1], [5, 0]]}, "warmup_steps": 7}, 4),
        ({"policy": "skd"}, 9),
        ({"policy": "skd", "guided_steps": 2}, 2),
        ({"policy": "student"}, 0),
        ({"policy": "student", "sft_steps": 4}, 4),
        ({"policy": "temperature", "policy_params": {"temperature": 0.5}}, 0),
    ],
)
def test_the_last_step_whose_rollouts_need_the_teacher(values: dict[str, Any], last: int):
    assert last_teacher_step(settings(**values), 9) == last


def test_releasing_a_teacher_that_is_needed_to_the_end_is_refused():
    check_guidance(settings(policy="trb", release_teacher=True))
    check_guidance(settings(policy="skd", release_teacher=True, guided_steps=3))
    with pytest.raises(ValueError, match=r"release_teacher=true never frees anything: trb\.policy=skd asks"):
        check_guidance(settings(policy="skd", release_teacher=True))


@pytest.mark.parametrize("policy", ["trb", "fixed_epsilon", "skd", "teacher", "temperature", "student"])
def test_validation_is_the_student_s_own(policy: str):
    params = {"temperature": 0.5} if policy == "temperature" else {}
    assert guidance(settings(policy=policy, policy_params=params), 1, validate=True) is None


def test_the_student_is_never_guided():
    assert over_steps(settings(policy="student", epsilon=0.5), 3) == [None] * 3


@pytest.mark.parametrize(
    ("policy", "params"),
    [
        ("trb", {"epsilon": 0}),
        ("fixed_beta", {"beta": 0}),
        ("teacher_mix", {"alpha": 0}),
        ("temperature", {"temperature": 1}),
    ],
)
def test_a_value_that_means_the_student_guides_nothing(policy: str, params: dict[str, float]):
    assert guidance(settings(policy=policy, policy_params=params), 1) is None
    assert guidance(settings(policy="fixed_epsilon", epsilon=0), 1) is None


@pytest.mark.parametrize("policy", ["student", "trb"])
def test_fine_tuning_is_on_the_teachers_rollouts(policy: str):
    trb = settings(policy=policy, sft_steps=2, warmup_steps=4, epsilon=0.04)
    assert [step_policy(trb, step) for step in (1, 2, 3)] == ["teacher", "teacher", policy]
    assert over_steps(trb, 2) == [{}, {}] and guidance(trb, 1, validate=True) is None
    assert guidance(trb, 3) == (None if policy == "student" else {"epsilon": pytest.approx(0.02)})


def test_guided_steps_end_any_policy():
    trb = settings(policy="teacher", guided_steps=2)
    assert over_steps(trb, 4) == [{}, {}, None, None]
    longer = settings(policy="trb", warmup_steps=2, guided_steps=9, policy_params={"epsilon": 0.3})
    assert over_steps(longer, 10) == [{"epsilon": 0.3}] * 9 + [None]


def test_defaults_and_given_values():
    assert guidance(settings(policy="skd"), 7) == {"k": 25, "temperature": 1.0}
    assert guidance(settings(policy="skd", policy_params={"k": 3}), 7) == {"k": 3, "temperature": 1.0}
    assert guidance(settings(policy="teacher_mix"), 7) == {"alpha": 0.2}


def test_a_schedule_is_a_line_through_its_points():
    """The paper's temperature warm-up: τ₀ to 1, the last step below 1 is step 4."""
    trb = settings(policy="temperature", policy_params={"temperature": [[1, 0.8], [5, 1.0]]})
    values = over_steps(trb, 6)
    assert [value and value["temperature"] for value in values] == [
        pytest.approx(x) for x in (0.8, 0.85, 0.9, 0.95)
    ] + [
        None,
        None,
    ]


def test_a_schedule_for_epsilon_takes_the_place_of_the_annealing():
    params = {"epsilon": [[1, 0.1], [3, 0.2], [5, 0.0]]}
    trb = settings(policy="trb", epsilon=0.7, warmup_steps=50, policy_params=params)
    values = [value["epsilon"] if value else 0 for value in over_steps(trb, 6)]
    assert values == pytest.approx([0.1, 0.15, 0.2, 0.1, 0, 0])


def test_settings_as_verl_hands_them_on():
    """Ray workers hold a DictConfig."""
    trb = OmegaConf.create({"trb": {"policy": "temperature", "policy_params": {"temperature": [[1, 0.5], [3, 1]]}}}).trb
    trb.guided_steps, trb.warmup_steps, trb.epsilon = None, 5, 0.1
    trb.sft_steps = 0
    assert guidance(trb, 2) == {"temperature": 0.75}


def test_what_is_logged():
    trb = settings(policy="trb", epsilon=0.04, warmup_steps=4)
    assert guidance_metrics(trb, 1) == {"trb/epsilon": 0.04}
    assert guidance_metrics(trb, 5) == guidance_metrics(settings(policy="student"), 1) == {"trb/epsilon": 0.0}
    assert guidance_metrics(settings(policy="skd"), 1) == {"trb/param/k": 25.0, "trb/param/temperature": 1.0}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"policy": "trb", "epsilon": 0.05, "warmup_steps": 30}, "trb, ε₀ = 0.05, K = 30"),
        ({"policy": "fixed_epsilon", "epsilon": 0.05}, "fixed_epsilon, ε = 0.05"),
        ({"policy": "skd", "guided_steps": 9}, "skd, k = 25, temperature = 1, guided until step 9"),
        (
            {"policy": "temperature", "policy_params": {"temperature": [[1, 0.8], [16, 1]]}},
            "temperature, temperature 0.8 at step 1 → 1 at step 16",
        ),
    ],
)
def test_description(values: dict[str, Any], says: str):
    assert describe(settings(**values)) == says


REFUSED = [
    ("teacher_mix", {"alhpa": 0.2}, "has no parameter 'alhpa'; did you mean alpha?"),
    ("teacher_mix", {"x": 0.2}, "has no parameter 'x'; it takes alpha."),
    ("student", {"epsilon": 0.2}, "trb.policy_params.epsilon: the rollout policy 'student' takes no parameters."),
    ("teacher", {"alpha": 0.2}, "the rollout policy 'teacher' takes no parameters."),
    ("fixed_beta", {}, "The rollout policy 'fixed_beta' needs trb.policy_params.beta, a number between 0 and 1."),
    ("temperature", {}, "needs trb.policy_params.temperature, a number > 0."),
    ("teacher_mix", {"alpha": 1.5}, "trb.policy_params.alpha must be a number between 0 and 1, got 1.5."),
    ("fixed_beta", {"beta": -0.1}, "trb.policy_params.beta must be a number between 0 and 1, got -0.1."),
    ("trb", {"epsilon": -1}, "trb.policy_params.epsilon must be a number >= 0, got -1."),
    ("temperature", {"temperature": 0}, "trb.policy_params.temperature must be a number > 0, got 0."),
    ("skd", {"k": 0}, "trb.policy_params.k must be a whole number >= 1, got 0."),
    ("skd", {"k": 2.5}, "trb.policy_params.k must be a whole number >= 1, got 2.5."),
    ("skd", {"k": [[1, 5], [9, 2]]}, "trb.policy_params.k must be a whole number >= 1, got [[1, 5], [9, 2]]."),
    ("teacher_mix", {"alpha": "much"}, "trb.policy_params.alpha must be a number between 0 and 1, got 'much'."),
    ("teacher_mix", {"alpha": True}, "trb.policy_params.alpha must be a number between 0 and 1, got True."),
    ("teacher_mix", {"alpha": [[1, 0.1], [5, 2]]}, "trb.policy_params.alpha must be a number between 0 and 1, got 2."),
    ("teacher_mix", {"alpha": [[5, 0.1], [5, 0]]}, "trb.policy_params.alpha: The steps of a schedule must increase"),
    ("teacher_mix", {"alpha": []}, "trb.policy_params.alpha: A schedule needs at least one (step, value) point."),
    ("teacher_mix", {"alpha": [0.1, 0.2]}, "must be a number or a list of [step, value] points, got [0.1, 0.2]."),
    ("teacher_mix", {"alpha": [[1, "a"]]}, "must be a number or a list of [step, value] points, got [[1, 'a']]."),
]


@pytest.mark.parametrize(("policy", "params", "says"), REFUSED)
def test_parameters_that_are_refused(policy: str, params: dict[str, Any], says: str):
    with pytest.raises(ValueError) as refused:
        check_guidance(settings(policy=policy, policy_params=params))
    assert says in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("policy", "params"),
    [
        ("skd", {"k": 1, "temperature": 0.01}),
        ("teacher_mix", {"alpha": [[3, 0.5]]}),
        ("fixed_beta", {"beta": 1}),
        ("trb", {}),
    ],
)
def test_parameters_at_the_edge_are_taken(policy: str, params: dict[str, Any]):
    check_guidance(settings(policy=policy, policy_params=params))


def test_k_and_the_vocabulary():
    check_vocabulary(settings(policy="skd"), 25)
    with pytest.raises(ValueError, match=r"trb.policy_params.k=25 is larger than the vocabulary of 24 tokens"):
        check_vocabulary(settings(policy="skd"), 24)
    for other in ({"policy": "trb"}, {"policy": "nobody"}, {"policy": "skd", "policy_params": {"k": "x"}}):
        check_vocabulary(settings(**other), 2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trb.policy=student", "trb.policy_params.epsilon=0.1"], "'student' takes no parameters"),
        (["trb.policy=student", "trb.guided_steps=5"], "trb.guided_steps=5 guides nothing with trb.policy=student"),
        (["trb.policy=student", "trb.epsilon=0.1"], "trb.epsilon would do nothing, because trb.policy=student has no"),
        (["method=skd", "trb.warmup_steps=9"], "trb.warmup_steps would do nothing, because trb.policy=skd has no eps"),
        (["method=fixed_epsilon", "trb.warmup_steps=9"], "because trb.policy=fixed_epsilon keeps its epsilon"),
        (["trb.policy_params.epsilon=0.1", "trb.epsilon=0.1"], "trb.policy_params.epsilon stands in its place"),
        (["trb.topk=4"], "trb.topk would do nothing, because trb.loss=full"),
        (["trb.loss=topk", "trb.topk=400"], "trb.topk=400 is larger than the vocabulary of"),
        (["trb.policy=tbr"], "did you mean 'trb'"),
        (["trb.divergence=revers_kl"], "did you mean 'reverse_kl'"),
        (["trb.guided_steps=0"], "trb.guided_steps must be >= 1"),
        (["method=teacher_mix", "trb.policy_params.alpha=1.2"], "must be a number between 0 and 1, got 1.2"),
        (["method=skd", "trb.policy_params.k=1000"], "k=1000 is larger than the vocabulary of"),
        (["trb.policy=skd", "trb.policy_params.kk=3"], "no parameter 'kk'; did you mean k?"),
        (["method=sdk"], "There is no method 'sdk'; did you mean method=skd?"),
    ],
)
def test_commands_that_are_refused(refusal: Callable[..., str], toy: ToyRun, arguments: list[str], says: str):
    assert says in refusal(*toy.overrides, *arguments)
    assert not (toy.folder / "run").exists()
