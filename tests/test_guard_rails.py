"""What is warned about in a history of metrics, and what is not."""

import pytest

from verl_trb.config import WarnConfig
from verl_trb.guard_rails import WINDOW, warnings

LIMITS = WarnConfig()
USUAL = {
    "trb/log_ratio": 0.04,
    "trb/log_ratio_trainer": 0.04,
    "trb/reverse_kl": 0.5,
    "actor/grad_norm": 2.0,
    "trb/student_entropy": 1.0,
    "response_length/mean": 20.0,
    "trb/eos_rate": 1.0,
    "trb/skipped_updates": 0.0,
}


def said(steps: int = 10, limits: WarnConfig = LIMITS, **last) -> list[str]:
    history = [{"step": step, **USUAL} for step in range(1, steps)]
    return [what for what, _ in warnings([*history, {"step": steps, **USUAL, **last}], limits)]


def test_a_usual_step_is_not_warned_about():
    assert said() == [] and warnings([], LIMITS) == []


@pytest.mark.parametrize(
    "last, expected",
    [
        ({"trb/log_ratio_trainer": 0.2}, "mismatch"),
        ({"trb/log_ratio_trainer": -0.2}, "mismatch"),
        ({"trb/reverse_kl": 6.0}, "spike of trb/reverse_kl"),
        ({"actor/grad_norm": 21.0}, "spike of actor/grad_norm"),
        ({"trb/student_entropy": 0.09}, "collapse of trb/student_entropy"),
        ({"response_length/mean": 1.0}, "collapse of response_length/mean"),
        ({"trb/eos_rate": 0.0}, "endless"),
        ({"trb/skipped_updates": 1.0}, "not finite"),
    ],
)
def test_each_fault_is_found_alone(last, expected):
    assert said(**last) == [expected]


def test_just_inside_the_thresholds_nothing_is_said():
    inside = {"trb/log_ratio_trainer": 0.08, "trb/reverse_kl": 5.0, "trb/student_entropy": 0.11, "trb/eos_rate": 0.01}
    assert said(**inside) == []


def test_thresholds_are_the_configurations():
    assert said(limits=WarnConfig(spike=2), **{"trb/reverse_kl": 1.1}) == ["spike of trb/reverse_kl"]
    assert said(limits=WarnConfig(eos_rate=0.5), **{"trb/eos_rate": 0.4}) == ["endless"]


def test_the_first_steps_have_nothing_to_be_compared_with():
    assert said(steps=5, **{"trb/reverse_kl": 100.0}) == []


def test_missing_and_not_finite_numbers_are_no_fault_of_their_own():
    assert said(**{"trb/reverse_kl": None, "trb/log_ratio": float("nan")}) == []
    assert warnings([{"step": 1}], LIMITS) == []


def test_only_the_last_steps_count():
    history = [{**USUAL, "trb/reverse_kl": 100.0} for _ in range(50)] + [USUAL] * WINDOW
    assert warnings([*history, {**USUAL, "trb/reverse_kl": 6.0}], LIMITS)[0][0] == "spike of trb/reverse_kl"


def test_the_sentence_names_the_likely_causes_and_the_setting():
    text = warnings([{**USUAL, "trb/log_ratio_trainer": 1.0}], LIMITS)[0][1]
    assert all(word in text for word in ("vocabulary mask", "dtype", "weights", "trb.warn.mismatch=0.05"))
