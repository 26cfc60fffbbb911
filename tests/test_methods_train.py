"""Every method of recipes/methods/ trains the quickstart's models, through the real stack: three steps each."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from verl_trb.recipe_source import METHOD, names

STEPS, TIMEOUT = 3, 600  # training steps; seconds for one run
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * TIMEOUT)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy pair, made once; kept between test runs where the environment names a folder."""
    folder = os.environ.get("VERL_TRB_TEST_CACHE")
    return Path(folder) if folder else tmp_path_factory.mktemp("cache")


def train(method: str, tmp_path: Path, cache: Path, *arguments: str) -> list[dict]:
    """The metrics of every training step."""
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
