"""A run on a real Ray cluster of two nodes on this machine: raylets with resources and addresses of their own.

The cluster is started by scripts/ray_cluster.sh and the run submitted by scripts/ray_submit.sh, as a user would. Two
FSDP ranks and two rollout engines, one on each node, against one rank with one engine and the same global batch: first
steps whose rollouts are the data's own responses, so that both must compute the same losses, then guided ones.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from verl_trb.checkpoints import find
from verl_trb.report import read_metrics

ROOT = Path(__file__).parents[1]
STEPS, EXACT, BATCH = 6, 3, 48  # steps, of which with the data's responses; prompts a step
TIMEOUT = 900
SETTINGS = [
    "recipe=quickstart",
    f"trainer.total_training_steps={STEPS}",
    "trainer.test_freq=100",
    "trainer.val_before_train=false",
    f"data.train_batch_size={BATCH}",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=24",
    "trb.data_response=reward_model.ground_truth",
    f"trb.data_share=[[{EXACT},1],[{EXACT + 1},0]]",
]
# A third of a batch fits no larger one.
THREE_NODES = ["recipe=quickstart", "trainer.nnodes=3", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * TIMEOUT)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Cluster:
    environment: dict[str, str]  # with which jobs are submitted
    head: str
    addresses: list[str]
    processes: list[subprocess.Popen]  # `ray start` of head and worker
    start_worker: Callable[[], subprocess.Popen]

    def submit(self, *arguments: str, **changed: str) -> subprocess.CompletedProcess:
        command = [str(ROOT / "scripts" / "ray_submit.sh"), *arguments]
        environment = {**self.environment, **changed}
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment)


def node(folder: Path, number: int, log: Path, *command: str, **environment: str) -> subprocess.Popen:
    """One raylet in the foreground, with a temporary folder and agents' ports of its own."""
    ports = f"--dashboard-agent-listen-port={free_port()} --metrics-export-port={free_port()}"
    if command[0] == "head":
        ports += f" --ray-client-server-port={free_port()}"
    own = {"RAY_TMP": str(folder / str(number)), "DEVICES": "1", "CPUS": "32", "RAY_OPTIONS": ports}
    return subprocess.Popen(
        [str(ROOT / "scripts" / "ray_cluster.sh"), *command],
        env={**os.environ, **environment, **own},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def wait_for(text: str, log: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 600
    while text not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def end(processes: list[subprocess.Popen]) -> None:
    """Ends the raylets, then what they have not ended themselves."""
    running = [process for process in processes if process.poll() is None]
    family = [child for process in running for child in psutil.Process(process.pid).children(recursive=True)]
    for process in reversed(running):
        process.send_signal(signal.SIGTERM)
    for process in running:
        process.wait(timeout=60)
    _, alive = psutil.wait_procs(family, timeout=20)
    for process in alive:
        process.kill()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    logs = tmp_path_factory.mktemp("cluster")
    short = Path(f"/tmp/trb-{os.getpid()}")  # the paths of sockets are limited to 107 characters
    token = logs / "token"
    port, dashboard = free_port(), free_port()
    own = {"RAY_AUTH_TOKEN_PATH": str(token)}
    processes = [
        node(short, 1, logs / "head", "head", HEAD_PORT=str(port), DASHBOARD_PORT=str(dashboard), **own),
    ]
    try:
        wait_for("Ray runtime started", logs / "head", processes[0])
        said = (logs / "head").read_text().partition("worker ")[2].split()[0]

        def start_worker() -> subprocess.Popen:
            process = node(short, 2, logs / "worker", "worker", said, NODE_IP="127.0.0.2", **own)
            processes.append(process)
            wait_for("Ray runtime started", logs / "worker", process)
            return process

        start_worker()
        environment = {**os.environ, **own, "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        yield Cluster(environment, said, [said.partition(":")[0], "127.0.0.2"], processes, start_worker)
    finally:
        end(processes)
        subprocess.run(["rm", "-rf", str(short)])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy pair, made once; kept between test runs where the environment names a folder."""
    folder = os.environ.get("VERL_TRB_TEST_CACHE")
    return Path(folder) if folder else tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def one_node(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> list[dict]:
    """Metrics of the run with one rank and one engine, in a Ray of its own."""
    folder = tmp_path_factory.mktemp("one") / "run"
    command = [sys.executable, "-m", "verl_trb.main", *SETTINGS, f"trb.run_dir={folder}", f"trb.cache_dir={cache}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stdout + done.stderr
    return metrics(folder)


@pytest.fixture(scope="module")
def two_nodes(cluster: Cluster, one_node: list[dict], tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict:
    """The same on both nodes. After `one_node`, which makes the models."""
    folder = tmp_path_factory.mktemp("two") / "run"
    done = cluster.submit(*SETTINGS, "trainer.nnodes=2", f"trb.run_dir={folder}", f"trb.cache_dir={cache}")
    assert done.returncode == 0, done.stdout + done.stderr
    return {"metrics": metrics(folder), "screen": done.stdout, "folder": folder}


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["step"] > 0]


def test_run_uses_both_nodes(cluster: Cluster, two_nodes: dict):
    assert "Placement" in two_nodes["screen"] and "Traceback" not in two_nodes["screen"]
    for address in cluster.addresses:
        assert any(line.startswith(address) for line in two_nodes["screen"].splitlines()), two_nodes["screen"]
        workers = list(two_nodes["folder"].glob(f"logs/*/{address}/worker-*.out"))
        assert any("BlendedHttpServer" in file.read_text() for file in workers), f"no engine on {address}"
    assert "asks for no token" not in two_nodes["screen"]
    assert (two_nodes["folder"] / "student" / "model.safetensors").stat().st_size > 0


def test_losses_are_those_of_one_node(one_node: list[dict], two_nodes: dict):
    """The same rollouts, so the same losses, through EXACT updates: only the order of sums differs."""
    for one, two in list(zip(one_node, two_nodes["metrics"], strict=True))[:EXACT]:
        for name in (
            "actor/loss",
            "trb/reverse_kl",
            "trb/student_entropy",
            "trb/teacher_entropy",
            "trb/teacher_logprob",
        ):
            assert two[name] == pytest.approx(one[name], abs=1e-5), (one["step"], name)
        assert two["actor/grad_norm"] == pytest.approx(one["actor/grad_norm"], rel=1e-4)


def test_guided_steps_agree_within_sampling_error(one_node: list[dict], two_nodes: dict):
    """Other random numbers, the same distributions: 5 standard errors of a step's means (α < 1e-6 each).

    A rollout's mean of the reverse KL has a standard deviation below 0.8 here, so a step's mean of 48 one of 0.12; of
    the acceptance (0.93 of 1,000 drafts a step, correlated within a rollout) 0.02.
    """
    for one, two in list(zip(one_node, two_nodes["metrics"], strict=True))[EXACT:]:
        assert two["trb/epsilon"] == one["trb/epsilon"] > 0
        assert abs(two["trb/reverse_kl"] - one["trb/reverse_kl"]) < 5 * 2**0.5 * 0.12
        assert abs(two["trb/acceptance"] - one["trb/acceptance"]) < 5 * 2**0.5 * 0.02
        # Both engines sampled with the weights that the trainer has: the sync reached both.
        assert two["trb/log_ratio_trainer"] == pytest.approx(two["trb/log_ratio"], abs=2e-5)
        assert two["trb/kl/max"] <= two["trb/epsilon"] * (1 + 1e-5)


def test_who_has_no_token_is_refused(cluster: Cluster):
    """By the head's own port and by the dashboard, whose other side is the loopback device alone."""
    connect = f"import ray; ray.init(address={cluster.head!r}, log_to_driver=False); print(len(ray.nodes()))"
    with_token = {**cluster.environment, "RAY_AUTH_MODE": "token"}
    for environment, nodes in ((with_token, "2"), ({"RAY_AUTH_MODE": "disabled"}, "")):
        environment = {**os.environ, **environment}
        environment.pop("RAY_ADDRESS", None)
        if not nodes:
            environment.pop("RAY_AUTH_TOKEN_PATH", None)
        done = subprocess.run(
            [sys.executable, "-c", connect], capture_output=True, text=True, timeout=120, env=environment
        )
        assert done.stdout.strip() == nodes, done.stderr[-2000:]
    refused = cluster.submit(
        "recipe=quickstart", "trb.run_dir=/tmp/none", RAY_AUTH_TOKEN_PATH="", RAY_AUTH_TOKEN="other"
    )
    assert refused.returncode == 2 and "asks for its token" in refused.stderr
    port = int(cluster.environment["RAY_ADDRESS"].rpartition(":")[2])
    listening = {c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port}
    assert listening == {"127.0.0.1"}


def test_cluster_that_is_too_small_is_refused(cluster: Cluster, tmp_path: Path, cache: Path):
    done = cluster.submit(*THREE_NODES, f"trb.run_dir={tmp_path}/run", f"trb.cache_dir={cache}")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "cannot hold trainer.nnodes=3 times trainer.n_gpus_per_node=1" in done.stdout
    assert "Traceback" not in done.stdout


def test_a_node_is_lost(cluster: Cluster, tmp_path: Path, cache: Path):
    """The run says so and stops, because what is left is too small; with a node again, the same command goes on."""
    folder = tmp_path / "run"
    own = ["trainer.nnodes=2", "trainer.save_freq=1", f"trb.run_dir={folder}", f"trb.cache_dir={cache}"]
    arguments = [*SETTINGS, *own]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(cluster.submit, *arguments)
        while find(folder / "checkpoints").step < 2:
            assert not running.done(), running.result().stdout
            time.sleep(0.1)
        family = psutil.Process(cluster.processes[1].pid)
        for process in [family, *family.children(recursive=True)]:
            process.kill()
        done = running.result()
    said = " ".join(done.stdout.split())
    assert done.returncode == 2 and "Traceback" not in said, said
    assert "starting again from step" in said and "cannot hold trainer.nnodes=2" in said, said
    cluster.start_worker()
    done = cluster.submit(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["step"] for line in read_metrics(folder)] == list(range(1, STEPS + 1))


def test_a_cluster_without_a_token_is_warned_about(tmp_path: Path, cache: Path):
    """One that somebody started by hand, without our scripts; three nodes are asked for, so that it ends there."""
    port, log, short = free_port(), tmp_path / "head", Path(f"/tmp/trb-open-{os.getpid()}")
    options = f"--head --block --port={port} --include-dashboard=false --num-gpus=1 --num-cpus=32 --temp-dir={short}"
    options += f" --dashboard-agent-listen-port={free_port()} --metrics-export-port={free_port()}"
    options += f" --ray-client-server-port={free_port()} --disable-usage-stats"
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    with log.open("w") as output:
        command = [str(Path(sys.executable).with_name("ray")), "start", *options.split()]
        head = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        wait_for("Ray runtime started", log, head)
        address = re.search(r"ray start --address='([\d.:]+)'", log.read_text())[1]
        joining = [f"ray_kwargs.ray_init.address={address}", "trb.prefork=false"]
        own = [f"trb.run_dir={tmp_path}/run", f"trb.cache_dir={cache}"]
        command = [sys.executable, "-m", "verl_trb.main", *THREE_NODES, *own, *joining]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment)
    finally:
        end([head])
        subprocess.run(["rm", "-rf", str(short)])
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 2 and "cannot hold trainer.nnodes=3" in said, said
    assert "this Ray cluster asks for no token" in said
