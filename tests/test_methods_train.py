"""Every method of recipes/methods/ trains the quickstart's models, through the real stack: three steps each."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from verl_trb.recipe_source import METHOD, names
from verl_trb.session import session

STEPS, TIMEOUT = 3, 600  # training steps; seconds for one run
BATCHES = ("ppo_mini_batch_size", "ppo_micro_batch_size_per_gpu")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * TIMEOUT)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy pair, made once; kept between test runs where the environment names a folder."""
    folder = os.environ.get("VERL_TRB_TEST_CACHE")
    return Path(folder) if folder else tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", autouse=True)
def template(tmp_path_factory: pytest.TempPathFactory):
    """The workers of all runs are forks of one process."""
    with session(["recipe=quickstart"], tmp_path_factory.mktemp("template") / "log"):
        yield


def train(method: str, tmp_path: Path, cache: Path, *arguments: str) -> list[dict]:
    """The metrics of every training step."""
    tmp_path.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "verl_trb.main", "recipe=quickstart", f"method={method}", *arguments]
    command += [f"trainer.total_training_steps={STEPS}", "trainer.test_freq=100", "trainer.val_before_train=false"]
    command += [f"trb.run_dir={tmp_path}/run", f"trb.cache_dir={cache}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["step"] > 0]


@pytest.mark.parametrize("method", names(METHOD))
def test_trains(method: str, tmp_path: Path, cache: Path):
    """Engine and trainer agree on log μ − log π_S of the same tokens, whatever the policy."""
    metrics = train(method, tmp_path, cache)
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    for line in metrics:
        assert math.isfinite(line["trb/reverse_kl"]) and line["trb/resubmitted"] == 0
        assert line["trb/log_ratio_trainer"] == pytest.approx(line["trb/log_ratio"], abs=1e-4)


def test_corrections_reach_the_training_batch(tmp_path: Path, cache: Path):
    """Every token that the engine did not accept is marked in the trainer's batch, and no other."""
    *guided, last = train("saki", tmp_path, cache, f"trb.warmup_steps={STEPS - 1}")
    for line in guided:
        assert line["trb/corrected"] == pytest.approx(1 - line["trb/acceptance"], abs=1e-12)
        assert line["trb/corrected"] > 0.01
    assert last["trb/corrected"] == 1 - last["trb/acceptance"] == 0


def test_rewards_beside_and_instead_of_distillation(tmp_path: Path, cache: Path):
    """Single-sample distillation from guided rollouts, then both terms, then the reward alone: importance weights are
    1 on the student's own rollouts, and the last step reads no teacher."""
    weights = ["trb.distill_weight=[[2,1],[3,0]]", "trb.reward_weight=[[1,0],[2,1]]", "trb.warmup_steps=1"]
    settings = ["trb.loss=sampled", "actor_rollout_ref.rollout.n=2"]
    guided, both, reward = train("trb", tmp_path, cache, *weights, *settings)
    assert 0 < guided["rollout_corr/rollout_is_eff_sample_size"] < 0.99 and guided["trb/epsilon"] > 0
    for line in (both, reward):
        for name in ("min", "max"):
            assert line[f"rollout_corr/rollout_is_{name}"] == pytest.approx(1, abs=1e-3)
    assert both["timing_s/teacher"] > 0 == reward["timing_s/teacher"] and "trb/reverse_kl" not in reward


@pytest.mark.parametrize("estimator", ["rloo", "reinforce_plus_plus"])
def test_verls_other_advantage_estimators_work_in_the_reward_phase(estimator: str, tmp_path: Path, cache: Path):
    """The first step distills, the others train on the reward alone, and move the student."""
    weights = ["trb.distill_weight=[[1,1],[2,0]]", "trb.reward_weight=[[1,0],[2,1]]"]
    settings = [f"algorithm.adv_estimator={estimator}", "actor_rollout_ref.rollout.n=4", "data.train_batch_size=48"]
    _, *rewarded = train("vanilla", tmp_path, cache, *weights, *settings)
    for line in rewarded:
        assert 0 < line["reward/mean"] < 1 and line["timing_s/teacher"] == 0
        assert 0 < line["actor/grad_norm"] < math.inf
        assert line["critic/advantages/max"] > 0 > line["critic/advantages/min"]


def test_responses_of_the_data_are_trained_on(tmp_path: Path, cache: Path):
    """All of them are right, which no student's are."""
    settings = ["trb.data_share=[[1,1],[3,0]]", "trb.data_response=reward_model.ground_truth"]
    metrics = train("gkd", tmp_path, cache, *settings)
    rewards = [line["reward/mean"] for line in metrics]
    assert rewards[0] == 1 and 0.2 < rewards[1] < 0.9 and rewards[2] < 0.3


@pytest.mark.parametrize(
    "loss",
    [
        ["trb.loss=topk", "trb.topk=4"],
        ["trb.loss=full", *(f"actor_rollout_ref.actor.{size}=24" for size in BATCHES)],  # two updates a step
        ["trb.loss=full", "trb.divergence=jsd", "trb.sft_steps=1"],
        ["trb.loss=sampled"],
        ["trb.loss=full", "trainer.n_gpus_per_node=2", f"actor_rollout_ref.actor.{BATCHES[1]}=24"],
    ],
    ids=["topk", "full", "jsd", "sampled", "two ranks"],
)
def test_reuse_of_verification_trains_as_reading_the_teacher_again(tmp_path: Path, cache: Path, loss: list[str]):
    """The same rollouts, and losses that agree to float32's precision; the last step is not guided, and reads it."""
    settings = [*loss, "trb.deterministic=true", f"trb.warmup_steps={STEPS - 1}"]
    read, reused = (
        train("trb", tmp_path / name, cache, *settings, f"trb.reuse_verification={name}") for name in ("false", "true")
    )
    for step, (one, other) in enumerate(zip(read, reused, strict=True), start=1):
        assert one["response_length/mean"] == other["response_length/mean"]
        for name in ("actor/loss", "actor/grad_norm", "trb/reverse_kl", "trb/teacher_entropy", "trb/teacher_logprob"):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), (step, name)
        assert one["timing_s/teacher"] > 0
        assert (other["timing_s/teacher"] > 0) == (step == STEPS)
