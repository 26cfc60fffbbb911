"""Which Ray a run uses: one of its own, or a cluster that stands. Imports no Ray."""

import os
import socket
from pathlib import Path

from omegaconf import DictConfig


def cluster_address(config: DictConfig) -> str | None:
    """Address of the cluster that the run joins (`auto`: Ray finds it); None for a Ray of its own.

    As `ray.init` has it: its argument, then RAY_ADDRESS, then the cluster that stands on this machine.
    """
    given = config.ray_kwargs.ray_init.get("address")
    if given == "local":
        return None
    environment = os.environ.get("RAY_ADDRESS")
    if given in (None, "auto") and environment:
        return None if environment == "local" else environment
    return given or recorded_cluster() or None


def recorded_cluster() -> str:
    """Address of the cluster on this machine, by Ray's own file; "" where there is none."""
    record = cluster_record()
    return record.read_text().strip() if record.is_file() else ""


def cluster_record() -> Path:
    """The file in which `ray start` writes its address."""
    return Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"


def answers(address: str) -> bool:
    """Whether something takes connections at HOST:PORT, with or without ray:// before it."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    except (OSError, ValueError):
        return False
    return True
