"""Where student, teacher and rollout engines live: what each node and device of a run holds.

`colocated` is what verl's synchronous trainer does: every device has a shard of the student and, sharded over the same
devices, of the teacher, and belongs to one rollout engine, which has both models whole, or split over its
tensor-parallel devices. Rank r is device r mod n of node r div n, n devices a node.

Pure arithmetic on the settings: no Ray, no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PLACEMENTS = ("colocated",)
GIB = 2**30
COLUMNS = ("node", "devices", "student", "teacher", "engines", "weights a device")


@dataclass(frozen=True)
class Layout:
    """How a run is laid out over `nodes` times `devices` devices.

    shards: devices that share one copy of student and teacher (FSDP). engine_devices: of one rollout engine.
    """

    nodes: int
    devices: int
    shards: int
    engine_devices: int

    @property
    def world(self) -> int:
        return self.nodes * self.devices

    @property
    def engines(self) -> int:
        return self.world // self.engine_devices


def layout(config: Any) -> Layout:
    """Of a composed configuration."""
    nodes, devices = config.trainer.nnodes, config.trainer.n_gpus_per_node
    world = max(1, nodes * devices)
    size = config.actor_rollout_ref.actor.fsdp_config.get("fsdp_size", -1)
    shards = world if size < 0 or size >= world else size
    return Layout(nodes, devices, max(1, shards), max(1, config.actor_rollout_ref.rollout.tensor_model_parallel_size))


def node_rows(
    plan: Layout, addresses: Sequence[str] = (), device_bytes: float | None = None, offload: bool = False
) -> list[tuple[str, ...]]:
    """One row of COLUMNS a node.

    Args:
        addresses: of the nodes, in the order of ranks; without them they are numbered.
        device_bytes: of weights, gradients and optimizer at rest on one device, where known.
        offload: the teacher's shards wait in host memory.
    """
    rows: list[tuple[str, ...]] = []
    memory = "unknown" if device_bytes is None else f"{device_bytes / GIB:.2f} GiB"
    for node in range(plan.nodes):
        first, last = node * plan.devices, (node + 1) * plan.devices - 1
        name = addresses[node] if node < len(addresses) else f"node {node + 1}"
        engines = (first // plan.engine_devices + 1, last // plan.engine_devices + 1)
        rows.append(
            (
                name,
                _span(0, plan.devices - 1),
                f"shard {_shards(first, last, plan.shards)}",
                f"shard {_shards(first, last, plan.shards)}{', on the host' if offload else ''}",
                f"{_span(*engines)} of {plan.engines}, TP {plan.engine_devices}",
                memory,
            )
        )
    return rows


def shown(rows: list[tuple[str, ...]], most: int = 8) -> list[tuple[str, ...]]:
    """The first and the last of many rows, with a row that says how many are left out."""
    if len(rows) <= most:
        return rows
    left_out = (f"… {len(rows) - most + 1} more", *["…"] * (len(COLUMNS) - 1))
    return [*rows[: most - 2], left_out, rows[-1]]


def weight_bytes(
    plan: Layout, student: int, teacher: int, *, training: int, teacher_element: int, engine_element: int, offload: bool
) -> float:
    """Bytes at rest on a device: the student's training state, the teacher's shard, and the engine's two models.

    student, teacher: parameters. training: bytes a parameter of weights, gradient and optimizer; the others: of one
    weight. KV cache and activations are not in it.
    """
    trained = student * training / plan.shards
    frozen = 0 if offload else teacher * teacher_element / plan.shards
    return trained + frozen + (student + teacher) * engine_element / plan.engine_devices


def _shards(first: int, last: int, shards: int) -> str:
    """The shards, counted from 1, of the ranks first to last, which may lie in several copies of the model."""
    if last - first + 1 >= shards:
        return f"1–{shards} of {shards}" if shards > 1 else "1 of 1"
    begin, end = first % shards + 1, last % shards + 1
    return f"{_span(begin, end)} of {shards}" if begin <= end else f"{begin}–{shards}, 1–{end} of {shards}"


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}–{last}"
