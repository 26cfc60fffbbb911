"""A user's reward function: found before the run, and called with limits on time and memory."""

import math
import time
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from verl_trb.errors import UserError
from verl_trb.rewards import function
from verl_trb.rewards.function import RewardFailed, check_reward_function, compute_score, limit

SOURCE = """
import time
import numpy as np

print("printed when it is imported")

def length(data_source, solution_str, ground_truth, extra_info=None, weight=1.0):
    print("printed when it is called")
    return weight * len(solution_str) + len(ground_truth)

def details(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": np.float32(0.5), "parts": np.arange(2), "index": extra_info["index"], "more": sorted(extra_info)}

async def later(data_source, solution_str, ground_truth, extra_info=None):
    return 0.25

def chosen(data_source, solution_str, ground_truth, extra_info=None):
    if solution_str == "hang":
        while True:
            time.sleep(10)
    if solution_str == "memory":
        return len(bytearray(2**30)) * 0.0
    if solution_str == "crash":
        import os
        os._exit(3)
    if solution_str == "object":
        return object()
    if solution_str == "nan":
        return float("nan")
    if solution_str == "raise":
        raise ValueError("no such answer")
    return 1.0
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(SOURCE)
    return path


def score(file: Path, name: str, text: str = "", extra=None, **arguments):
    limits = {"seconds": 3.0, "memory_mb": 256}
    return compute_score("set", text, ["a", "b"], extra, path=str(file), name=name, arguments=arguments, **limits)


def test_it_gets_and_gives_what_it_would_without_limits(file: Path):
    assert score(file, "length", "four") == 6
    assert score(file, "length", "four", weight=0.5) == 4
    extra = {"index": 7, "lock": object(), "none": None}
    assert score(file, "details", extra=extra) == {"score": 0.5, "parts": [0, 1], "index": 7, "more": ["index"]}
    assert score(file, "later") == 0.25
    assert score(f"file://{file}", "later") == 0.25
    assert math.isnan(score(file, "chosen", "nan"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hang", r"chosen of .*mine.py took longer than 3 s \(trb.reward_seconds\)\."),
        ("memory", "MemoryError"),
        ("crash", r"died: it crashed, or needed more than 256 MiB beside its imports \(trb.reward_memory_mb\)\."),
        ("object", "TypeError: a verdict holds a object"),
        ("raise", "^ValueError: no such answer$"),
    ],
)
def test_a_function_that_fails_is_a_sentence_and_the_next_call_works(file: Path, text: str, said: str):
    begun = time.monotonic()
    with pytest.raises(RewardFailed, match=said):
        score(file, "chosen", text)
    assert time.monotonic() - begun < 60
    assert score(file, "chosen", "fine") == 1.0


def test_a_module_that_cannot_be_imported(tmp_path: Path):
    (tmp_path / "broken.py").write_text("import there_is_no_such_module")
    with pytest.raises(RuntimeError, match="did not start: ModuleNotFoundError: No module named 'there_is_no_such_"):
        score(tmp_path / "broken.py", "any")


def config(path: str | None, name: str = "compute_score", seconds: float | None = 5.0, model: bool = False):
    reward = {
        "custom_reward_function": {"path": path, "name": name, "reward_kwargs": {"weight": 2.0}},
        "reward_model": {"enable": model},
    }
    return OmegaConf.create({"reward": reward, "trb": {"reward_seconds": seconds, "reward_memory_mb": 512}})


def named(settings: DictConfig) -> dict:
    return OmegaConf.to_container(settings.reward.custom_reward_function)


def test_verl_is_given_the_limited_function(file: Path):
    from verl.trainer.ppo.reward import get_custom_reward_fn

    settings = config(str(file), "length")
    limit(settings)
    assert named(settings)["path"] == f"pkg://{function.__name__}"
    found = get_custom_reward_fn(settings)
    assert found(data_source="set", solution_str="four", ground_truth="", extra_info={}) == 8


@pytest.mark.parametrize(
    "settings",
    [
        config(None),
        config("pkg://verl_trb.tasks.table_walk"),
        config("mine.py", seconds=None),
        config("mine.py", model=True),
    ],
)
def test_others_are_left_alone(settings: DictConfig):
    before = named(settings)
    limit(settings)
    assert named(settings) == before


def test_it_is_looked_for_before_the_run(file: Path, tmp_path: Path):
    check_reward_function(config(None))
    check_reward_function(config(str(file), "length"))
    check_reward_function(config(f"file://{file}", "length"))
    check_reward_function(config("pkg://verl_trb.rewards.math"))
    (tmp_path / "text.py").write_text("def (")
    for path, name, said in (
        (f"{tmp_path}/none.py", "length", "there is no such file"),
        ("pkg://verl_trb.no_such", "length", "there is no such module"),
        ("pkg://no_such_package.rewards", "length", "there is no such module"),
        (str(file), "lenght", "defines no such function; did you mean length?"),
        (str(file), "zzz", "defines no such function; it has length, details, later, chosen."),
        (f"{tmp_path}/text.py", "length", "is not Python: invalid syntax"),
    ):
        with pytest.raises(UserError) as refused:
            check_reward_function(config(path, name))
        assert said in str(refused.value)
