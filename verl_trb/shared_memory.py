"""Removes the shared memory that killed processes of a run have left behind.

vLLM's and verl's processes remove theirs when they end by themselves; after a Ctrl-C some are killed before, and so are
those of a run that starts again.
"""

import contextlib
import os
from pathlib import Path

FOLDER = Path("/dev/shm")
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
    used = _mapped()  # after they were found: what another run has made meanwhile is not among them
    removed = [file for file in found if str(file) not in used]
    for file in removed:
        file.unlink(missing_ok=True)
    return [file.name for file in removed]


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
