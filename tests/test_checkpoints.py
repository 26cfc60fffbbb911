"""A checkpoint folder is whole or it is not used: written under another name, killed at any moment, cut short."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from verl_trb import checkpoints


def write(root: Path, step: int, keep: int | None = None, pause: float = 0.0) -> None:
    """As the trainer does, with files whose content says the step."""
    partial = checkpoints.begin(root, step)
    (partial / "actor").mkdir()
    for number in range(4):
        (partial / "actor" / f"part_{number}.bin").write_bytes(str(step).encode() * 5000)
        time.sleep(pause)
    (partial / "data.json").write_text(f'{{"step": {step}}}')
    checkpoints.finish(partial)
    checkpoints.record(root, step)
    checkpoints.prune(root, keep, newest=step)


def steps(root: Path) -> list[str]:
    return sorted(folder.name for folder in root.iterdir() if folder.is_dir())


def test_the_last_complete_one_is_found(tmp_path):
    assert checkpoints.find(tmp_path / "absent") == checkpoints.Found()
    write(tmp_path, 2)
    write(tmp_path, 10)
    found = checkpoints.find(tmp_path)
    assert (found.step, found.newest, found.unusable) == (10, tmp_path / "global_step_10", [])
    assert (tmp_path / checkpoints.TRACKER).read_text() == "10"


def damage_cut(folder: Path) -> str:
    os.truncate(folder / "actor" / "part_1.bin", 100)
    return "actor/part_1.bin has 100 bytes instead of 5000"


def damage_missing(folder: Path) -> str:
    (folder / "data.json").unlink()
    return "data.json is missing"


def damage_manifest(folder: Path) -> str:
    (folder / checkpoints.MANIFEST).write_text('{"files": {"actor/part_0.bin": ')
    return "cannot be read"


def damage_no_manifest(folder: Path) -> str:
    (folder / checkpoints.MANIFEST).unlink()
    return "written last"


def damage_renamed(folder: Path) -> str:
    folder.rename(f"{folder}{checkpoints.PARTIAL}")
    return "half-written"


@pytest.mark.parametrize("damage", [damage_cut, damage_missing, damage_manifest, damage_no_manifest, damage_renamed])
def test_an_incomplete_one_is_reported_and_not_used(tmp_path, damage):
    write(tmp_path, 1)
    write(tmp_path, 2)
    reason = damage(tmp_path / "global_step_2")
    found = checkpoints.find(tmp_path)
    assert found.step == 1
    assert len(found.unusable) == 1 and "step 2" in found.unusable[0] and reason in found.unusable[0]
    write(tmp_path, 2)  # and it is written again over what is there
    assert checkpoints.find(tmp_path) == checkpoints.Found(tmp_path / "global_step_2", 2)


def test_older_ones_are_pruned_after_the_new_one_is_complete(tmp_path):
    for step in range(1, 6):
        write(tmp_path, step, keep=2)
    assert steps(tmp_path) == ["global_step_4", "global_step_5"]
    damage_cut(tmp_path / "global_step_5")
    write(tmp_path, 6, keep=2)  # of two to keep, the damaged one is none
    assert steps(tmp_path) == ["global_step_4", "global_step_6"]
    checkpoints.begin(tmp_path, 7)
    assert checkpoints.find(tmp_path).step == 6, "something went while the next one was only begun"


def test_killed_at_any_moment(tmp_path):
    """100 kills of a process that writes one checkpoint after the other, at random moments: the last complete one is
    what it says, never older than the one before the kill, and there is always one.
    """
    chance = random.Random(0)
    write(tmp_path, 1)
    half = 0
    for _ in range(100):
        before = checkpoints.find(tmp_path).step
        child = os.fork()
        if child == 0:
            for step in range(before + 1, before + 10_000):
                write(tmp_path, step, keep=2, pause=0.0)
            os._exit(0)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = checkpoints.find(tmp_path)
        half += bool(found.unusable)
        assert found.step >= before and found.newest is not None
        content = (found.newest / "actor" / "part_3.bin").read_bytes()
        assert content == str(found.step).encode() * 5000
    assert half > 10, "few kills hit a checkpoint being written"
    assert found.step > 20
