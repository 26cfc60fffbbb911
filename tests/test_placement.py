"""What lives on which node, which Ray a run uses, what is submitted, and the scripts that we ship for clusters."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from omegaconf import OmegaConf

from verl_trb import cluster, placement, submit
from verl_trb.cluster import CPUS_A_DEVICE, Node, asks_for_token, check_room, joining_arguments
from verl_trb.config import TrbConfig
from verl_trb.errors import ConfigError, UserError
from verl_trb.placement import Layout, node_rows
from verl_trb.ray_address import cluster_address

ROOT = Path(__file__).parents[1]
NODE_SCRIPTS = ("scripts/ray_cluster.sh", "scripts/slurm.sbatch", "scripts/ray_submit.sh")


# ------------------------------------------------------------------ placement


@pytest.mark.parametrize(
    ("plan", "last"),
    [
        (Layout(2, 1, shards=2, engine_devices=1), ("node 2", "0", "shard 2 of 2", "shard 2 of 2", "2 of 2, TP 1")),
        (Layout(2, 8, 16, 2), ("node 2", "0–7", "shard 9–16 of 16", "shard 9–16 of 16", "5–8 of 8, TP 2")),
        # Shards within a node, copies across: every node has the whole model.
        (Layout(4, 8, 8, 4), ("node 4", "0–7", "shard 1–8 of 8", "shard 1–8 of 8", "7–8 of 8, TP 4")),
        (Layout(3, 2, 3, 1), ("node 3", "0–1", "shard 2–3 of 3", "shard 2–3 of 3", "5–6 of 6, TP 1")),
    ],
)
def test_rows_say_what_a_node_holds(plan: Layout, last: tuple[str, ...]):
    rows = node_rows(plan)
    assert len(rows) == plan.nodes
    assert rows[-1][:-1] == last


def test_every_rank_holds_the_shard_that_the_row_says():
    """The spans against the definition, rank by rank."""
    plan = Layout(nodes=5, devices=4, shards=10, engine_devices=2)
    for node, row in enumerate(node_rows(plan, addresses=list("abcde"))):
        held = [rank % plan.shards + 1 for rank in range(4 * node, 4 * node + 4)]
        spans = row[2].removeprefix("shard ").partition(" of ")[0].split(", ")
        said = [n for span in spans for a, b in [map(int, span.split("–"))] for n in range(a, b + 1)]
        assert said == held and row[0] == "abcde"[node]


def test_weights_of_a_device():
    """16 bytes of training state and 4 of the teacher, sharded by 8; both models in bfloat16 in an engine of 2."""
    plan = Layout(nodes=2, devices=4, shards=8, engine_devices=2)
    sizes = {"training": 16, "teacher_element": 4, "engine_element": 2}
    held = placement.weight_bytes(plan, 800, 4000, **sizes, offload=False)
    assert held == 800 * 16 / 8 + 4000 * 4 / 8 + 4800 * 2 / 2
    assert held - placement.weight_bytes(plan, 800, 4000, **sizes, offload=True) == 4000 * 4 / 8


def test_many_nodes_are_shortened():
    rows = placement.shown(node_rows(Layout(64, 8, 512, 1)))
    assert len(rows) == 8 and rows[-2][0] == "… 57 more" and rows[-1][0] == "node 64"


@pytest.mark.parametrize(("value", "said"), [("separate", "is not there"), ("anywhere", "must be one of colocated")])
def test_other_placements_are_refused(value: str, said: str):
    with pytest.raises(ConfigError, match=f"trb.placement.*{said}"):
        TrbConfig(placement=value)


# ------------------------------------------------------------------ clusters


def test_which_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def address(given: str | None) -> str | None:
        return cluster_address(OmegaConf.create({"ray_kwargs": {"ray_init": {"address": given}}}))

    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert address(None) is None and address("local") is None and address("auto") == "auto"
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379\n")
    assert address(None) == "10.0.0.1:6379" and address("local") is None
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert address(None) == address("auto") == "10.0.0.2:6379"
    assert address("10.0.0.3:6379") == "10.0.0.3:6379" and address("local") is None
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert address(None) is None


def test_a_joined_cluster_gets_no_resources():
    given = {"address": "auto", "num_cpus": 32, "num_gpus": 1, "include_dashboard": False, "namespace": "mine"}
    assert joining_arguments(given) == {"address": "auto", "namespace": "mine"}


def test_room_of_a_cluster():
    def nodes(*sizes: tuple[int, int]) -> list[Node]:
        return [Node(str(n), f"10.0.0.{n}", devices, cpus) for n, (devices, cpus) in enumerate(sizes)]

    def wanted(nnodes: int, each: int) -> SimpleNamespace:
        return SimpleNamespace(trainer=SimpleNamespace(nnodes=nnodes, n_gpus_per_node=each))

    check_room(nodes((8, 64), (8, 64)), wanted(2, 8))
    check_room(nodes((8, 64)), wanted(2, 4))  # two groups on one node
    for sizes, nnodes, each in ((((8, 64), (4, 64)), 2, 8), (((8, 20),), 1, 8), ((), 1, 1)):
        with pytest.raises(UserError, match=f"cannot hold trainer.nnodes={nnodes}"):
            check_room(nodes(*sizes), wanted(nnodes, each))


def test_a_node_that_has_gone_while_it_was_asked_is_left_out(monkeypatch: pytest.MonkeyPatch):
    """Of three, the second is lost after the list was made, which its answer shows; two are enough. Then one is ill."""
    three = [Node(str(n), f"10.0.0.{n}", 1, 3) for n in range(3)]
    lists = iter([three, [three[0], three[2]]])
    asked = []

    def ask(found: list[Node], config: object) -> None:
        asked.append([node.id for node in found])
        if three[1] in found:
            raise UserError("Node 10.0.0.1 cannot run verl_trb.")

    monkeypatch.setattr(cluster, "nodes", lambda: next(lists))
    monkeypatch.setattr(cluster, "check_nodes", ask)
    config = SimpleNamespace(trainer=SimpleNamespace(nnodes=2, n_gpus_per_node=1))
    assert cluster.living_nodes(config) == [three[0], three[2]]
    assert asked == [["0", "1", "2"], ["0", "2"]]
    monkeypatch.setattr(cluster, "nodes", lambda: three)  # there, but ill: that is said
    with pytest.raises(UserError, match=r"10\.0\.0\.1 cannot run"):
        cluster.living_nodes(config)


def test_verl_reserves_as_many_cpus():
    from verl.single_controller.ray.base import ResourcePoolManager

    assert ResourcePoolManager.max_colocate_count == CPUS_A_DEVICE


def test_no_cluster_asks_nobody_for_a_token():
    assert not asks_for_token("127.0.0.1:1")


def test_several_nodes_need_a_cluster(refusal, toy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    settings = ["trainer.nnodes=2", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=24"]
    assert refusal(*toy.overrides, *settings).startswith("trainer.nnodes=2 needs a Ray cluster")


# ------------------------------------------------------------------ submitting


def test_what_is_submitted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("VERL_TRB_RECIPES", str(tmp_path))
    command = shlex.split(submit.entrypoint(["recipe=quickstart", "trb.data_share=[[1,1],[2,0]]", "+a.b=c d"]))
    assert command[:2] == ["env", "VERL_TRB_RECIPES=shipped_recipes/0"]
    assert command[2:5] == ["python", "-m", "verl_trb.main"]
    assert command[5:] == ["recipe=quickstart", "trb.data_share=[[1,1],[2,0]]", "+a.b=c d", *submit.JOINING]
    installed = shlex.split(submit.entrypoint(["recipe=quickstart", "trb.prefork=true"], ship=False))
    assert installed[0] == "python" and "trb.prefork=false" not in installed


def test_shipped_folder_is_an_installation(tmp_path: Path):
    """In an interpreter that has no other verl_trb: its recipes are found, and its plug-in of verl."""
    folder = submit.stage(tmp_path / "shipped")
    code = (
        "import json, sys, importlib.metadata as m; sys.path.insert(0, sys.argv[1]); sys.meta_path[:] = "
        "[f for f in sys.meta_path if 'editable' not in repr(f).lower()]; import verl_trb; "
        "from verl_trb.recipe_source import names; "
        "print(json.dumps([verl_trb.__file__, names('recipe'), "
        "[e.value for e in m.entry_points(group='verl.plugins', name='verl_trb_cpu')]]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, cwd=tmp_path)
    file, recipes, plugins = json.loads(done.stdout)
    assert file.startswith(str(folder)) and "quickstart" in recipes and set(plugins) == {"verl_trb.platforms:register"}
    assert not list(folder.rglob("*.pyc"))


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["trb.run_dir=/x"], {}, "No recipe given"),
        (["recipe=quickstart", "trb.run_dir=runs/x"], {}, "Give trb.run_dir=/SHARED/FOLDER"),
        (["recipe=quickstart", "trb.run_dir=/x"], {"RAY_ADDRESS": "10.0.0.1:6379"}, "is not where jobs go"),
        (["recipe=quickstart", "trb.run_dir=/x"], {"RAY_ADDRESS": "http://127.0.0.1:1"}, "No Ray cluster answers"),
    ],
)
def test_what_cannot_be_submitted(arguments, environment, said, monkeypatch, capsys):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "")
    monkeypatch.delenv("RAY_AUTH_MODE")  # gone again after the test, whatever the command sets it to
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert submit.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]


def test_output_of_a_job_is_printed_once(capsys):
    """A connection that breaks in the middle is taken up again, and the log starts anew."""
    import asyncio

    class Client:
        tries = 0

        def get_job_status(self, job):
            return "RUNNING" if self.tries < 2 else "SUCCEEDED"

        async def tail_job_logs(self, job):
            self.tries += 1
            yield "Runtime env is setting up.\none\n"
            if self.tries == 1:
                raise RuntimeError("closed")
            yield "two\n"

    asyncio.run(submit._print_logs(Client(), "job"))
    assert capsys.readouterr().out == "one\ntwo\n"


# ------------------------------------------------------------------ scripts


@pytest.mark.parametrize("script", NODE_SCRIPTS)
def test_scripts_are_shell(script: str):
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_every_way_to_a_cluster_has_a_token_and_a_loopback_dashboard():
    script = (ROOT / "scripts/ray_cluster.sh").read_text()
    assert "export RAY_AUTH_MODE=token" in script
    assert re.findall(r"--dashboard-host=(\S+)", script) == ["127.0.0.1"]
    slurm = (ROOT / "scripts/slurm.sbatch").read_text()
    assert "scripts/ray_cluster.sh head" in slurm and "RAY_AUTH_TOKEN_PATH" in slurm and "ray start" not in slurm
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    for service in compose["services"].values():
        assert service["entrypoint"][0] == "scripts/ray_cluster.sh" and "ports" not in service
    job, policy = yaml.safe_load_all((ROOT / "scripts/kuberay.yaml").read_text())
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"} and cluster["rayVersion"] == "2.60.0"
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    chosen = policy["spec"]["podSelector"]["matchLabels"]
    assert all(pod["template"]["metadata"]["labels"] == chosen for pod in pods)
    for folder in ("scripts", "docker"):  # nothing else starts a Ray
        others = [f for f in (ROOT / folder).iterdir() if f.is_file() and "ray start" in f.read_text()]
        assert [file.name for file in others] == (["ray_cluster.sh"] if folder == "scripts" else [])


def test_token_file(tmp_path: Path):
    """Made once, readable by its owner alone; one that others may read is refused."""
    token = tmp_path / "token"
    environment = {**os.environ, "RAY_AUTH_TOKEN_PATH": str(token)}
    environment.pop("RAY_AUTH_TOKEN", None)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [str(ROOT / "scripts/ray_cluster.sh"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    refused = run("worker", "127.0.0.1:1")
    assert refused.returncode == 2 and "there is no token in" in refused.stderr
    assert run("token").returncode == 0
    secret = token.read_text()
    assert len(secret) == 64 and token.stat().st_mode & 0o777 == 0o600 and secret not in run("token").stdout
    assert run("token").returncode == 0 and token.read_text() == secret
    token.chmod(0o644)
    refused = run("worker", "127.0.0.1:1")
    assert refused.returncode == 2 and "chmod 600" in refused.stderr
