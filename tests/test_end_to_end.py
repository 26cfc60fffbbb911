"""The quickstart, shortened, through the real stack: killed, interrupted, resumed, finished.

Three runs of one command: A is killed (SIGKILL, the whole tree) after step 3, B resumes and gets a Ctrl-C after step
5, C resumes and finishes. What is asserted is what a user relies on: ε and data order continue, rollouts follow μ,
engine and trainer agree on the student, nothing is left behind, the export loads.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path

import psutil
import pytest

from verl_trb.report import read_metrics
from verl_trb.report.samples import read_samples
from verl_trb.schedules import annealed_epsilon
from verl_trb.timeline import NOT_PARTS, read_timeline

# Many steps after the Ctrl-C: on a busy machine a few are over before it arrives.
STEPS, WARMUP, EPSILON, BATCH = 15, 4, 0.05, 24
SETTINGS = {
    "trb.epsilon": EPSILON,
    "trb.warmup_steps": WARMUP,
    "trainer.total_training_steps": STEPS,
    "trainer.save_freq": 2,
    "trainer.test_freq": 100,
    "data.val_max_samples": 32,
    "data.train_batch_size": BATCH,
    "actor_rollout_ref.actor.ppo_mini_batch_size": BATCH,
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": BATCH // 2,
}
TIMES = ("timing", "perf/time_per_step", "perf/throughput")  # known when a step is over
TIMEOUT = 600  # seconds for any one of the runs
pytestmark = pytest.mark.timeout(4 * TIMEOUT)


def start(run_dir: Path, cache: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "verl_trb.main", "recipe=quickstart"]
    command += [f"{key}={value}" for key, value in SETTINGS.items()]
    command += [f"trb.run_dir={run_dir}", f"trb.cache_dir={cache}", f"trainer.rollout_data_dir={run_dir}/rollouts"]
    # A session of its own, in which Ctrl-C means something, as a terminal would give it: programs that are started in
    # the background may ignore it, and their children with them. What it prints is shown when a test fails.
    output = open(run_dir.with_suffix(".out"), "a")
    return subprocess.Popen(
        [*command, *overrides],
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        cwd=run_dir.parent,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def printed(run_dir: Path) -> str:
    return run_dir.with_suffix(".out").read_text()


def lines(run_dir: Path) -> list[dict]:
    file = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int, after: int) -> None:
    """Until a line beyond the first `after` lines reports `step`."""
    deadline = time.monotonic() + TIMEOUT
    while not any(line["step"] == step for line in lines(run_dir)[after:]):
        assert process.poll() is None, f"ended with {process.returncode}:\n{printed(run_dir)}"
        assert time.monotonic() < deadline, f"no step {step} in {TIMEOUT} s:\n{printed(run_dir)}"
        time.sleep(0.1)


def wait_for_rollouts(run_dir: Path, step: int) -> None:
    """Until all rollouts of `step` are in their file: verl writes it beside the training, maybe behind the line."""
    file = run_dir / "rollouts" / f"{step}.jsonl"
    deadline = time.monotonic() + 60
    while not file.exists() or file.read_text().count("\n") < BATCH:
        assert time.monotonic() < deadline, f"no {file} in 60 s:\n{printed(run_dir)}"
        time.sleep(0.01)


def rollouts_at_checkpoint(process: subprocess.Popen, run_dir: Path, step: int) -> int:
    """How many rollouts of `step` are in their file when its checkpoint gets its name."""
    file, folder = run_dir / "rollouts" / f"{step}.jsonl", run_dir / "checkpoints" / f"global_step_{step}"
    deadline = time.monotonic() + TIMEOUT
    while not folder.exists():
        assert process.poll() is None, f"ended with {process.returncode}:\n{printed(run_dir)}"
        assert time.monotonic() < deadline, f"no {folder} in {TIMEOUT} s:\n{printed(run_dir)}"
        time.sleep(0.001)
    return file.read_text().count("\n") if file.exists() else 0


def tree(process: subprocess.Popen) -> list[psutil.Process]:
    root = psutil.Process(process.pid)
    return [root, *root.children(recursive=True)]


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "sem.mp-", "verl", "torch_"))}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """The toy pair, made once; kept between test runs where the environment names a folder."""
    folder = os.environ.get("VERL_TRB_TEST_CACHE")
    return Path(folder) if folder else tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache) -> dict:
    """A, B and C, one after the other, and what each left behind."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    shm_before = shared_memory()

    killed = start(run_dir, cache)
    at_checkpoint = rollouts_at_checkpoint(killed, run_dir, 2)
    wait_for_step(killed, run_dir, 3, after=0)
    wait_for_rollouts(run_dir, 3)
    processes = tree(killed)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=30)
    killed.wait(timeout=30)
    first_rollouts = {step: prompts(run_dir, step) for step in (1, 2, 3)}
    # As if killed between the checkpoint of step 2 and the end of its weight sync, which no test can aim at.
    lost = next(line for line in lines(run_dir) if line["step"] == 2)
    left = [json.dumps(line) + "\n" for line in lines(run_dir) if line["step"] != 2]
    (run_dir / "metrics.jsonl").write_text("".join(left))
    after_kill = len(left)
    for name in shared_memory() - shm_before:  # SIGKILL lets nobody clean up; what follows must
        Path("/dev/shm", name).unlink(missing_ok=True)

    interrupted = start(run_dir, cache)
    wait_for_step(interrupted, run_dir, 5, after=after_kill)
    family = tree(interrupted)
    interrupted.send_signal(signal.SIGINT)
    interrupted.wait(timeout=90)
    _, alive = psutil.wait_procs(family, timeout=10)
    after_interrupt = len(lines(run_dir))

    finished = start(run_dir, cache)
    finished.wait(timeout=TIMEOUT)
    return {
        "run_dir": run_dir,
        "killed_at": after_kill,
        "lost": lost,
        "at_checkpoint": at_checkpoint,
        "first_rollouts": first_rollouts,
        "interrupted": (interrupted.returncode, [process.name() for process in alive]),
        "interrupted_at": after_interrupt,
        "finished": finished.returncode,
        "shared_memory": shared_memory() - shm_before,
        "metrics": read_metrics(run_dir),
    }


def prompts(run_dir: Path, step: int) -> list[str]:
    """The prompts of a step's rollouts, in any order: which answer comes first is chance."""
    file = run_dir / "rollouts" / f"{step}.jsonl"
    return sorted(json.loads(line)["input"] for line in file.read_text().splitlines())


def test_killed_run_resumes_from_its_last_checkpoint(runs):
    assert runs["finished"] == 0, printed(runs["run_dir"])
    steps = [line["step"] for line in lines(runs["run_dir"])]
    resumed = [step for step in steps[runs["killed_at"] :] if step > 0]
    assert steps[: runs["killed_at"]][-1] == 3
    assert [step for step in resumed if step != 2][0] == 3, "the checkpoint of step 2 was not where it went on"
    assert [line["step"] for line in runs["metrics"]] == list(range(STEPS + 1))


def test_line_of_a_step_that_was_killed_behind_its_checkpoint_is_kept(runs):
    restored = lines(runs["run_dir"])[runs["killed_at"]]
    assert restored == {name: value for name, value in runs["lost"].items() if not name.startswith(TIMES)}
    assert len(restored) > 50


def test_resumed_run_sees_the_prompts_it_had_not_trained_on(runs):
    assert prompts(runs["run_dir"], 3) == runs["first_rollouts"][3]
    seen = [set(prompts(runs["run_dir"], step)) for step in range(1, STEPS + 1)]
    assert len(set.union(*seen)) == STEPS * BATCH, "a prompt came twice within one epoch"


def test_rollouts_of_a_checkpoint_are_on_the_disk_before_it(runs):
    assert runs["at_checkpoint"] == BATCH, "a run killed now would never write them: the step is not drawn again"


def test_epsilon_continues(runs):
    for line in runs["metrics"]:
        if line["step"] > 0:
            assert line["trb/epsilon"] == pytest.approx(annealed_epsilon(line["step"], EPSILON, WARMUP))


def test_ctrl_c_leaves_nothing_behind(runs):
    code, alive = runs["interrupted"]
    assert code == 130 and alive == []
    assert "resumes from the last checkpoint" in printed(runs["run_dir"])


def test_ctrl_c_leaves_no_shared_memory_behind(runs):
    assert runs["shared_memory"] == set()


def test_rollouts_follow_the_trust_region(runs):
    """mean(log μ − log π_S) is KL(μ‖π_S) up to sampling error while ε > 0, and 0 after K.

    The standard error of the mean is at most sqrt(Var) / sqrt(tokens); with ε ≤ 0.05 the variance of the log-ratio
    is below 2 · 4 ε (measured: 0.1 … 0.3), so 5 standard errors (α < 1e-6) of 24 · 15 tokens are 0.17; the fixed bound
    is tighter for what the runs show, and fails for rollouts of the teacher (log-ratio ≈ 1.4).
    """
    for line in (line for line in runs["metrics"] if line["step"] > 0):
        assert line["trb/kl/max"] <= line["trb/epsilon"] * (1 + 1e-5)
        if line["trb/epsilon"] > 0:
            assert abs(line["trb/log_ratio"] - line["trb/kl/mean"]) < 0.1
            assert line["trb/acceptance"] >= 1 - (line["trb/epsilon"] / 2) ** 0.5 - 0.1
        else:
            assert line["trb/log_ratio"] == line["trb/kl/max"] == line["trb/beta/max"] == 0
            assert line["trb/acceptance"] == 1


def test_engine_and_trainer_hold_the_same_student(runs):
    """A stale or partial weight sync shows here: the same tokens' log π_S by vLLM and by the trainer."""
    for line in (line for line in runs["metrics"] if line["step"] > 0):
        assert line["trb/log_ratio_trainer"] == pytest.approx(line["trb/log_ratio"], abs=2e-5)


def test_run_folder_is_complete(runs):
    run_dir = runs["run_dir"]
    files = ("config.yaml", "metrics.jsonl", "samples.jsonl", "report.html", "report.png", "report-details.png")
    for name in (*files, "student/config.json", "logs/driver.log"):
        assert (run_dir / name).stat().st_size > 0
    last = runs["metrics"][-1]
    for name in (
        "val/accuracy",
        "val/table_walk_selection",
        "trb/reverse_kl",
        "trb/teacher_entropy",
        "timing_s/step",
        "timing_s/teacher",
    ):
        assert name in last
    screen = printed(run_dir)
    assert "Results" in screen and "Traceback" not in screen and "WARNING" not in screen


def test_sample_rollouts_are_kept(runs):
    """Two prompts at the first step, the middle and the end of the guided ones, and the last step."""
    samples = read_samples(runs["run_dir"])
    guided = {(s.step, s.policy) for s in samples if s.policy != "student"}
    assert guided == {(step, "trb") for step in (1, 2, WARMUP)}
    assert {s.step for s in samples} == {1, 2, WARMUP, STEPS} and len({s.prompt for s in samples}) == 2
    for sample in samples:
        assert sample.tokens and (sample.policy == "trb" or sample.log_mu == sample.logp_student)
        pairs = zip(sample.corrected, sample.drafts, strict=True)
        assert all((draft is not None) == corrected for corrected, draft in pairs)


def test_every_logged_name_is_documented(runs):
    """docs/metrics.md has a row for every name of ours, and for the ones of verl's that it names by a star."""
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    known = [name for row in re.findall(r"^\| (.+?) \|", page, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)]
    logged = {name for line in runs["metrics"] for name in line} - {"step"}
    assert len(logged) > 60
    missing = {name for name in logged if not any(fnmatchcase(name, pattern) for pattern in known)}
    assert not missing, f"logged, but not in docs/metrics.md: {sorted(missing)}"


def test_finished_run_is_not_trained_again(runs, cache):
    again = start(runs["run_dir"], cache)
    assert again.wait(timeout=120) == 0
    assert "this run is finished" in printed(runs["run_dir"])
    assert read_metrics(runs["run_dir"]) == runs["metrics"]


def test_other_settings_do_not_continue_a_run(runs, cache):
    other = start(runs["run_dir"], cache, "trb.epsilon=0.01")
    assert other.wait(timeout=120) == 2
    assert "trb.epsilon=0.05" in printed(runs["run_dir"]).splitlines()[-1]


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
ids = tokenizer("3ABCDEFGHABCD=", add_special_tokens=False).input_ids
greedy = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8)[0, len(ids):].tolist()
import verl_trb.platforms
from vllm import LLM, SamplingParams
llm = LLM(model=folder, dtype="float32", enforce_eager=True, max_model_len=64, kv_cache_memory_bytes=2**26)
answer = llm.generate([{"prompt_token_ids": ids}], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
print("SAME", greedy == list(answer[0].outputs[0].token_ids))
"""


def test_exported_student_loads_in_transformers_and_plain_vllm(runs):
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, "-c", LOAD, str(runs["run_dir"] / "student")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment)
    assert "SAME True" in done.stdout, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["topk", "sampled"])
def test_other_losses_train(tmp_path, cache, loss):
    """The reverse KL falls between steps whose prefixes are all the student's own: guided ones have less of it."""
    run_dir = tmp_path / "run"
    process = start(run_dir, cache, f"trb.loss={loss}", "trainer.total_training_steps=20", "trb.warmup_steps=6")
    assert process.wait(timeout=2 * TIMEOUT) == 0, printed(run_dir)
    reverse_kl = [line["trb/reverse_kl"] for line in read_metrics(run_dir)[1:]]
    assert sum(reverse_kl[-3:]) < sum(reverse_kl[6:9])
    shutil.rmtree(run_dir)


@pytest.mark.slow
def test_real_model_distills(tmp_path, cache):
    """A real tokenizer, chat template and EOS; V = 49,152."""
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "verl_trb.main", "recipe=smollm2_pruned", f"trb.run_dir={run_dir}"]
    done = subprocess.run([*command, f"trb.cache_dir={cache}"], capture_output=True, text=True, timeout=2 * TIMEOUT)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = read_metrics(run_dir)[1:]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    assert steps[-1]["trb/reverse_kl"] < 0.8 * steps[0]["trb/reverse_kl"]
    for line in steps:
        assert line["trb/log_ratio_trainer"] == pytest.approx(line["trb/log_ratio"], abs=1e-3)
        assert line["trb/kl/max"] <= line["trb/epsilon"] * (1 + 1e-5)


REWARDS = """
def broken(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    raise ValueError("the verifier has no network")

def broken_for_some(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return broken(data_source, solution_str, ground_truth) if ground_truth[1] in "01" else 1.0
"""


@pytest.mark.slow
def test_reward_function_that_raises(tmp_path, cache):
    """One sentence where every rollout fails; a warning and the rest of the batch where some do."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    where = f"reward.custom_reward_function.path={tmp_path}/rewards.py"
    for name, code in (("broken", 1), ("broken_for_some", 0)):
        function = f"reward.custom_reward_function.name={name}"
        process = start(tmp_path / name, cache, where, function, "trainer.total_training_steps=2")
        assert process.wait(timeout=TIMEOUT) == code, printed(tmp_path / name)
        screen = printed(tmp_path / name)
        assert "rollouts" in screen and "failed" in screen and "ValueError: the verifier has no network" in screen
        assert "Traceback" not in screen
    steps = read_metrics(tmp_path / "broken_for_some")[1:]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(0 < line["trb/failed_rollouts"] < BATCH and line["reward/mean"] == 1 for line in steps)


@pytest.mark.slow
def test_two_runs_side_by_side(tmp_path, cache):
    """Each with a Ray of its own, whose jobs have the same number: neither gets the other's weights."""
    learning_rates = {"slow": "1e-5", "fast": "1e-2"}
    runs = {
        name: start(tmp_path / name, cache, f"actor_rollout_ref.actor.optim.lr={lr}", "trainer.total_training_steps=4")
        for name, lr in learning_rates.items()
    }
    for name, process in runs.items():
        assert process.wait(timeout=TIMEOUT) == 0, printed(tmp_path / name)
        steps = read_metrics(tmp_path / name)[1:]
        assert [line["step"] for line in steps] == [1, 2, 3, 4]
        for line in steps:
            assert line["trb/log_ratio_trainer"] == pytest.approx(line["trb/log_ratio"], abs=2e-5)


def test_the_parts_of_every_step_add_up_and_one_step_is_drawn(runs):
    timelines = {one.step: one for one in read_timeline(runs["run_dir"])}
    timed = [line for line in runs["metrics"][1:] if "timing_s/step" in line]
    untimed = {line["step"] for line in runs["metrics"][1:]} - {line["step"] for line in timed}
    # Killed between its checkpoint and its end, step 2 lost its times; the Ctrl-C may have come there, too.
    at_interrupt = lines(runs["run_dir"])[runs["interrupted_at"]]["step"]
    assert {runs["lost"]["step"]} <= untimed <= {runs["lost"]["step"], at_interrupt}
    for line in timed:
        times = {name.removeprefix("timing_s/"): line[name] for name in line if name.startswith("timing_s/")}
        parts = {name: seconds for name, seconds in times.items() if name not in NOT_PARTS}
        assert {"submit", "gen", "adv", "update_actor", "update_weights"} <= parts.keys()
        assert sum(parts.values()) + times["other"] == pytest.approx(times["step"])
        assert 0 <= times["other"] < 0.2 * times["step"]
        assert 0 < times["teacher"] < times["update_actor"]
        timeline = timelines[line["step"]]
        assert timeline.seconds == pytest.approx(times["step"], abs=0.1)
        drawn = [span.end - span.start for span in timeline.spans if span.lane == "trainer"]
        assert sum(drawn) == pytest.approx(sum(parts.values()), abs=0.05)
        generated = [span for span in timeline.spans if span.name == "generate"]
        assert len(generated) == BATCH
    assert (runs["run_dir"] / "timeline.png").stat().st_size > 10_000
