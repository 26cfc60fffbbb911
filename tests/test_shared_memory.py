"""Orphans of killed processes go; what a living process uses stays."""

import subprocess
import sys
import time
from multiprocessing import shared_memory

import pytest

from verl_trb.shared_memory import FOLDER, remove_orphans

# A process that is killed together with its resource tracker leaves its segment behind.
LEAVE = """
import os, sys
from multiprocessing import resource_tracker, shared_memory
name = f"verl_weights_{os.getpid()}" if "sync" in sys.argv else None
segment = shared_memory.SharedMemory(name, create=True, size=64)
resource_tracker.unregister(segment._name, "shared_memory")
print(segment.name)
"""

# Another run's weight syncs, on a machine so busy that a segment is unmapped for a while before it is removed.
SYNCS = """
import time
from multiprocessing import shared_memory
print("begins", flush=True)
for _ in range(30):
    segment = shared_memory.SharedMemory(f"verl_weights_{time.time_ns()}", create=True, size=64)
    segment.close()
    time.sleep(0.1)
    segment.unlink()
"""


@pytest.mark.parametrize("kind", ["plain", "sync"])
def test_orphans_are_removed_and_segments_in_use_are_kept(kind: str):
    since = time.time() - 1
    command = [sys.executable, "-c", LEAVE, kind]
    orphan = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    used = shared_memory.SharedMemory(create=True, size=64)
    try:
        assert (FOLDER / orphan).exists()
        removed = remove_orphans(since)
        assert orphan in removed and not (FOLDER / orphan).exists()
        assert used.name not in removed and (FOLDER / used.name).exists()
        assert remove_orphans(time.time() + 60) == []
    finally:
        used.close()
        used.unlink()


def test_segments_that_another_run_is_about_to_remove_are_left_to_it():
    since = time.time() - 1
    process = subprocess.Popen([sys.executable, "-c", SYNCS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    removed = []
    while process.poll() is None:
        removed += remove_orphans(since)
    assert (process.returncode, process.stderr.read(), removed) == (0, "", [])
