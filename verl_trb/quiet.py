"""Keeps the screen for the display: whatever libraries print in this process goes to a log file."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def quiet(log_file: Path) -> Iterator[TextIO]:
    """Send file descriptors 1 and 2 to `log_file`, and give a text stream of what standard output was.

    By descriptor, because Ray and its C++ parts do not write through `sys.stdout`.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush(), sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    screen = os.fdopen(os.dup(saved[0]), "w", encoding=encoding, errors="replace", buffering=1)
    try:
        os.dup2(log, 1), os.dup2(log, 2)
        yield screen
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        screen.close()
        os.dup2(saved[0], 1), os.dup2(saved[1], 2)
        for descriptor in (*saved, log):
            os.close(descriptor)
