"""Removes the shared memory that killed processes of a run have left behind.

vLLM's and verl's processes remove theirs when they end by themselves; after a Ctrl-C some are killed before, and so are
those of a run that starts again.
"""

import contextlib
import os
import time
from pathlib import Path

FOLDER = Path("/dev/shm")
SETTLE = 0.5  # seconds in which who has unmapped a segment has also removed it
PREFIXES = ("psm_", "sem.mp-", "verl_weights_")  # names that Python's multiprocessing and verl's weight syncs give


def remove_orphans(since: float) -> list[str]:
    """Unlink this user's segments made after `since` (seconds since the epoch) that no living process has mapped.

    Returns:
        The names removed. Nothing is removed where it cannot be told what is in use.
    """
    if not FOLDER.is_dir():
        return []
    found = []
    for file in FOLDER.iterdir():
        with contextlib.suppress(FileNotFoundError):
            status = file.stat()
            if file.name.startswith(PREFIXES) and status.st_uid == os.getuid() and status.st_ctime >= since:
                found.append(file)
    orphans = _unmapped(found)  # after they were found: what another run has made meanwhile is not among them
    if orphans:
        time.sleep(SETTLE)  # or another run, about to remove its own, would find it gone
        orphans = _unmapped(orphans)
    for file in orphans:
        file.unlink(missing_ok=True)
    return [file.name for file in orphans]


def _unmapped(files: list[Path]) -> list[Path]:
    used = _mapped()
    return [file for file in files if str(file) not in used and file.exists()]


def _mapped() -> set[str]:
    """Paths under /dev/shm that a process of this user has mapped or open."""
    paths: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            lines = (process / "maps").read_text().splitlines()
            paths.update(line[line.index("/dev/shm/") :].strip() for line in lines if "/dev/shm/" in line)
            paths.update(os.readlink(descriptor) for descriptor in (process / "fd").iterdir())
        except (OSError, ValueError):
            continue  # ended meanwhile, or another user's
    return paths
