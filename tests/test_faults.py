"""Faults injected into real runs of the toy pair: each is survived, or stops the run with a sentence that names it."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from verl_trb import checkpoints, prefork, session
from verl_trb.report import read_metrics
from verl_trb.shared_memory import remove_orphans

TIMEOUT = 900  # seconds for any one of the runs
BATCH = 8
SETTINGS = [
    "recipe=quickstart",
    "trb.warmup_steps=4",
    "trainer.save_freq=1",
    "trainer.test_freq=1000",
    "trainer.val_before_train=false",
    "data.val_max_samples=8",
    f"data.train_batch_size={BATCH}",
    f"actor_rollout_ref.actor.ppo_mini_batch_size={BATCH}",
    f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={BATCH}",
]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * TIMEOUT)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    folder = os.environ.get("VERL_TRB_TEST_CACHE")
    return Path(folder) if folder else tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", autouse=True)
def template(tmp_path_factory):
    """All runs and their workers are forks."""
    with session.session(["recipe=quickstart"], tmp_path_factory.mktemp("template") / "log"):
        yield


class Run:
    """One command in a folder of its own; `screen` is what it has printed."""

    def __init__(self, run_dir: Path, cache: Path, steps: int, *overrides: str) -> None:
        self.run_dir, self.output = run_dir, run_dir.with_suffix(".out")
        self.began = time.time()
        arguments = [*SETTINGS, f"trainer.total_training_steps={steps}"]
        arguments += [f"trb.run_dir={run_dir}", f"trb.cache_dir={cache}", *overrides]
        self.process = psutil.Process(session.start(arguments, self.output))

    @property
    def screen(self) -> str:
        return self.output.read_text()

    def until(self, what: str, seen: Callable[[], bool], every: float = 0.1) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not seen():
            assert self.process.status() != psutil.STATUS_ZOMBIE, f"ended with {self.process.wait()}:\n{self.screen}"
            assert time.monotonic() < deadline, f"no {what} in {TIMEOUT} s:\n{self.screen}"
            time.sleep(every)

    def until_said(self, words: str) -> None:
        self.until(repr(words), lambda: words in self.screen)

    def until_checkpoint(self, step: int) -> None:
        self.until(f"checkpoint {step}", lambda: checkpoints.find(self.run_dir / "checkpoints").step >= step)

    def send(self, name: str, number: signal.Signals) -> None:
        """A signal to the run's processes whose title begins with `name`, or whose program is called so."""
        members = psutil.Process().children(recursive=True)  # the workers are the template's
        titles = {member: member.cmdline() or [""] for member in members}
        hit = [m for m, title in titles.items() if " ".join(title).startswith(name) or Path(title[0]).name == name]
        assert hit, [" ".join(title)[:60] for title in titles.values()]
        for member in hit:
            member.send_signal(number)

    def end(self) -> int:
        code = self.process.wait(timeout=TIMEOUT)
        assert "Traceback" not in self.screen, self.screen
        (template,) = (child for child in psutil.Process().children() if "verl_trb.prefork" in child.cmdline())
        _, left = psutil.wait_procs(template.children(recursive=True), timeout=30)
        assert not left, "processes of the run that it left behind"
        assert not remove_orphans(self.began), "shared memory that it left behind"
        return code


ENGINE = "VLLM::EngineCore"


def test_killed_processes_are_replaced(tmp_path, cache):
    """The engine is killed during a weight sync or just after it, then a rollout worker: two restarts, and every step
    is there.
    """
    run = Run(tmp_path / "run", cache, 9, "trb.max_restarts=2")
    kills = [
        (ENGINE, "the rollout engine's process ended"),
        ("ray::DistillationAgentLoopWorker", "a rollout worker died"),
    ]
    for number, (name, said) in enumerate(kills, start=1):
        run.until_checkpoint(checkpoints.find(run.run_dir / "checkpoints").step + 2)
        run.until("weight sync", lambda: "sending" in (run.run_dir / "status.json").read_text(), every=0.005)
        run.send(name, signal.SIGKILL)
        run.until_said(f"{number} of at most 2 times")
        assert said in " ".join(run.screen.split()), run.screen
    assert run.end() == 0, run.screen
    all_steps_are_right(run, 9, restarts=2)


def test_rays_own_processes_are_replaced(tmp_path, cache):
    run = Run(tmp_path / "run", cache, 100_000, "trb.max_restarts=2")
    kills = [("gcs_server", "Ray's control process (gcs_server at"), ("raylet", "died")]
    for number, (name, said) in enumerate(kills, start=1):
        run.until_checkpoint(checkpoints.find(run.run_dir / "checkpoints").step + 2)
        run.send(name, signal.SIGKILL)
        run.until_said(f"{number} of at most 2 times")
        assert said in " ".join(run.screen.split()), run.screen
    run.until_checkpoint(checkpoints.find(run.run_dir / "checkpoints").step + 2)
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130, run.screen
    steps = [line["step"] for line in read_metrics(run.run_dir)]
    assert steps == list(range(1, len(steps) + 1))


def test_an_engine_that_hangs_is_replaced(tmp_path, cache):
    run = Run(tmp_path / "run", cache, 4, "trb.max_restarts=1", "trb.stall_seconds=150")
    run.until_checkpoint(2)
    run.send(ENGINE, signal.SIGSTOP)
    run.until_said("1 of at most 1 times")
    said = " ".join(run.screen.split())
    assert "nothing has moved for 150 s" in said and "the rollout engine" in said, run.screen
    assert run.end() == 0, run.screen
    all_steps_are_right(run, 4, restarts=1)


def all_steps_are_right(run: Run, steps: int, restarts: int) -> None:
    lines = read_metrics(run.run_dir)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert lines[-1]["trb/restarts"] == restarts
    for line in lines:
        assert line["trb/log_ratio_trainer"] == pytest.approx(line["trb/log_ratio"], abs=2e-5), "stale weights"


REWARDS = """
import time

def hangs(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    time.sleep(100_000)

def hangs_for_some(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return hangs(data_source, solution_str, ground_truth) if ground_truth[1] in "01" else 1.0
"""


def test_a_reward_function_that_hangs_for_some(tmp_path, cache):
    """Its rollouts are left out and counted, and the run goes on."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    where = f"reward.custom_reward_function.path={tmp_path}/rewards.py"
    name = "reward.custom_reward_function.name=hangs_for_some"
    run = Run(tmp_path / "run", cache, 2, where, name, "trb.reward_seconds=2")
    assert run.end() == 0
    assert "took longer than 2 s (trb.reward_seconds)" in " ".join(run.screen.split())
    steps = [line for line in read_metrics(run.run_dir) if line["step"] > 0]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(line["trb/failed_rollouts"] > 0 and line["reward/mean"] == 1 for line in steps)


def test_a_reward_function_that_hangs_without_a_limit(tmp_path, cache):
    """There is no checkpoint yet, so nothing to go on from: it stops, and says who waits for what."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    function = [f"reward.custom_reward_function.path={tmp_path}/rewards.py", "reward.custom_reward_function.name=hangs"]
    run = Run(tmp_path / "run", cache, 2, *function, "trb.stall_seconds=150", "trb.reward_seconds=null")
    assert run.end() == 1
    last = " ".join(run.screen.split())
    assert "nothing has moved for 150 s (trb.stall_seconds)" in last
    assert "the rollouts of step 1: 0 of 8 prompts done, waiting for the reward function (8 rollouts)" in last


@pytest.mark.parametrize(("whose", "what"), [("student", "nan"), ("teacher", "nan"), ("student", "inf")])
def test_nan_or_inf_in_the_logits(tmp_path, cache, whose, what):
    """Of a NaN weight all logits are NaN, of a row of the head that is too large one is infinite: the engine counts the
    positions, and the run stops at its first step.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from verl_trb.tasks.prepare import prepare

    made = getattr(prepare("table_walk", str(cache), print), whose)
    model = AutoModelForCausalLM.from_pretrained(made)
    with torch.no_grad():
        if what == "nan":
            model.get_input_embeddings().weight[:, 0] = torch.nan
        else:
            model.get_output_embeddings().weight[7] = 3e38
    model.save_pretrained(tmp_path / whose)
    AutoTokenizer.from_pretrained(made).save_pretrained(tmp_path / whose)
    key = {"student": "actor_rollout_ref.model.path", "teacher": "trb.teacher.path"}[whose]
    run = Run(tmp_path / "run", cache, 3, f"{key}={tmp_path / whose}")
    assert run.end() == 1
    assert f"step 1: the rollout engine got NaN or infinite logits of the {whose}" in " ".join(run.screen.split())


LOOPS = """
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

class Silent(SingleTurnAgentLoop):
    async def run(self, sampling_params, **kwargs):
        output = await super().run(sampling_params, **kwargs)
        if kwargs["raw_prompt"][-1]["content"][0] in "{which}":
            output.response_ids, output.response_mask, output.response_logprobs = [], [], []
        return output
"""


@pytest.mark.parametrize("which", ["01234", "0123456789"])
def test_empty_rollouts(tmp_path, cache, monkeypatch, which):
    """An agent loop gives back no token for some prompts, or for all: they are left out and counted, or it stops."""
    (tmp_path / "silent_loop.py").write_text(LOOPS.format(which=which))
    (tmp_path / "loops.yaml").write_text("- {name: silent, _target_: silent_loop.Silent}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # of the workers
    monkeypatch.syspath_prepend(tmp_path)  # of the command, a fork of this process
    monkeypatch.delenv(prefork.SHARED)  # that template has another path
    agent = "actor_rollout_ref.rollout.agent"
    loop = [f"{agent}.agent_loop_config_path={tmp_path}/loops.yaml", f"{agent}.default_agent_loop=silent"]
    run = Run(tmp_path / "run", cache, 2, *loop)
    code, said = run.end(), " ".join(run.screen.split())
    assert code == (0 if len(which) < 10 else 1), run.screen
    if code == 0:
        assert "of 8 rollouts failed and were left out, the first with an empty rollout" in said
        assert [0 < line["trb/failed_rollouts"] < BATCH for line in read_metrics(run.run_dir)] == [True, True]
    else:
        assert "all 8 rollouts of step 1 failed, with an empty rollout: the agent loop gave back no token" in said


def test_all_rollouts_truncated(tmp_path, cache):
    """A warning that stays on the screen; the run goes on."""
    run = Run(tmp_path / "run", cache, 2, "data.max_response_length=6")
    assert run.end() == 0
    assert "0% of the responses said their end" in " ".join(run.screen.split())
    assert all(line["trb/eos_rate"] == 0 for line in read_metrics(run.run_dir))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a given size at run/checkpoints; skipped where one may not be mounted."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)

    def mount(size: int, *options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={size}"]), "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs root, to mount a small file system")

    yield mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def test_full_disk(tmp_path, cache, small_disk):
    """The third checkpoint does not fit: a sentence, the second one is intact, and with room the run goes on."""
    one = 1_250_000  # bytes: a little more than a checkpoint of the toy student
    small_disk(int(2.5 * one))
    run = Run(tmp_path / "run", cache, 4)
    assert run.end() == 1
    said = " ".join(run.screen.split())
    assert "the checkpoint of step" in said and "could not be written" in said and "is intact" in said
    before = checkpoints.find(run.run_dir / "checkpoints")
    assert 1 <= before.step <= 3 and before.unusable == []
    small_disk(20 * one, "remount")
    assert Run(tmp_path / "run", cache, 4).end() == 0
    assert [line["step"] for line in read_metrics(run.run_dir)] == [1, 2, 3, 4]
    steps = [line["step"] for line in map(json.loads, (run.run_dir / "metrics.jsonl").read_text().splitlines())]
    assert steps.count(before.step) == 1, "it did not go on from the intact checkpoint"
