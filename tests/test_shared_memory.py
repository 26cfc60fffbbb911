"""Orphans of killed processes go; what a living process uses stays."""

import subprocess
import sys
import time
from multiprocessing import shared_memory

from verl_trb.shared_memory import FOLDER, remove_orphans

# A process that is killed together with its resource tracker leaves its segment behind.
LEAVE = """
from multiprocessing import resource_tracker, shared_memory
segment = shared_memory.SharedMemory(create=True, size=64)
resource_tracker.unregister(segment._name, "shared_memory")
print(segment.name)
"""


def test_orphans_are_removed_and_segments_in_use_are_kept():
    since = time.time() - 1
    orphan = subprocess.run([sys.executable, "-c", LEAVE], capture_output=True, text=True, check=True).stdout.strip()
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
