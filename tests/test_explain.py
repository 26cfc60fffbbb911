"""What Ray wraps around an error is taken off again, and the component that is gone gets its name."""

import pytest
import ray

from verl_trb.errors import ComponentLost, RunError
from verl_trb.faults import explain

DIED = "The actor died unexpectedly before finishing this task.\n\tclass_name: {}\n\tactor_id: 1f\n\tpid: 7\n"


def wrapped(error: Exception, times: int = 2) -> Exception:
    """As it arrives after crossing processes."""
    for _ in range(times):
        error = ray.exceptions.RayTaskError("call", f"Traceback (most recent call last):\n{error}", error)
    return error


class EngineDeadError(Exception):
    """vLLM's by name: importing it would take seconds."""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("DistillationAgentLoopWorker", "a rollout worker died"),
        ("AgentLoopWorkerTQ", "a rollout worker died"),
        ("create_colocated_worker_cls.<locals>.WorkerDict", "a training worker died"),
        ("BlendedHttpServer", "the rollout engine's server died"),
        ("SomethingElse", "SomethingElse died"),
    ],
)
def test_a_dead_actor_is_named(name, said):
    error = explain(wrapped(ray.exceptions.RayActorError(error_msg=DIED.format(name))), "the rollouts of step 3")
    assert isinstance(error, ComponentLost)
    assert str(error) == f"{said} during the rollouts of step 3"


def test_an_actor_that_could_not_start_would_fail_again():
    text = "The actor died because of an error raised in its creation task\nTraceback\nValueError: max_model_len is 3"
    error = explain(wrapped(ray.exceptions.RayActorError(error_msg=text, actor_init_failed=True)), "the start")
    assert not isinstance(error, ComponentLost) and str(error).endswith("ValueError: max_model_len is 3")


def test_a_dead_engine():
    error = explain(wrapped(EngineDeadError("EngineCore encountered an issue. See stack trace")), "the validation")
    assert isinstance(error, ComponentLost) and "the rollout engine's process ended during the validation" in str(error)


@pytest.mark.parametrize(
    "text",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [10.0.0.1]:1: Connection reset by peer. "
        "This is typically caused by a remote worker hanging",
        "[../gloo/transport/tcp/pair.cc:554] Connection closed by peer [10.0.0.1]:54",
        "NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited or there was a network error, NCCL version 2",
    ],
)
def test_who_lost_the_connection_tells_that_another_is_gone(text):
    error = explain(wrapped(RuntimeError(text)), "the training of step 2")
    assert isinstance(error, ComponentLost)
    assert str(error).startswith("a training worker died or its node was lost during the training of step 2")


def test_a_collective_that_is_wrong_would_fail_again():
    for text in ("NCCL error: invalid usage, duplicate GPU detected", "the judge's server: Connection reset by peer"):
        assert not isinstance(explain(wrapped(RuntimeError(text)), "the start"), ComponentLost)


def test_an_error_in_code_is_no_lost_component():
    error = explain(wrapped(ValueError("first\nthe verifier has no network")), "the training of step 2")
    assert not isinstance(error, ComponentLost)
    assert str(error) == "the training of step 2: ValueError: the verifier has no network"


def test_what_is_a_sentence_already_stays():
    for kind in (RunError, ComponentLost):
        error = explain(wrapped(kind("one sentence")), "anything")
        assert type(error) is kind and str(error) == "one sentence"
