"""Runs as forks of one process: exit codes, signals, and one template for all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from verl_trb import prefork, session


def test_a_run_is_the_command_and_its_exit_code_is_the_commands(tmp_path: Path) -> None:
    screen = tmp_path / "screen"
    assert session.run(["recipe=nobody"], screen) == 2
    assert "There is no recipe 'nobody'" in screen.read_text()
    assert session.run(["--help"], screen) == 0
    assert "python -m verl_trb.main recipe=quickstart" in screen.read_text()
    assert "nobody" not in screen.read_text(), "the screen is the last run's"


def test_all_runs_of_a_session_share_one_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "DRIVER", ())
    log = tmp_path / "log"
    with session.session(["recipe=quickstart", f"trb.run_dir={tmp_path}/run"], log):
        environment, command = json.loads(os.environ[prefork.SHARED])
        assert environment["OMP_NUM_THREADS"] == "1"
        for _ in range(2):
            with prefork.template(environment, str(log)) as found:
                assert found == command
        with prefork.template({**environment, "OMP_NUM_THREADS": "2"}, str(log)) as other:
            assert other != command, "a run with another environment has its own"
    assert prefork.SHARED not in os.environ
    assert not (tmp_path / "run").exists()


def test_a_recipe_without_forked_workers_needs_no_template(tmp_path: Path) -> None:
    with session.session(["recipe=quickstart", "trb.prefork=false"], tmp_path / "log"):
        assert prefork.SHARED not in os.environ


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_first(number: int, code: int, tmp_path: Path) -> None:
    """SIGTERM comes to the parent alone and is passed on; Ctrl-C comes to both."""
    script = """
import sys, time
from pathlib import Path
import verl_trb.main
from verl_trb import session

def run(arguments):
    print("running", flush=True)
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        return 130

verl_trb.main.main = run
print(session.run([], Path(sys.argv[1])))
"""
    screen = tmp_path / "screen"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(screen)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    for _ in range(600):
        if screen.exists() and "running" in screen.read_text():
            break
        time.sleep(0.1)
    (child,) = psutil.Process(process.pid).children()
    if number == signal.SIGTERM:
        process.send_signal(number)
    else:
        os.killpg(process.pid, number)
    assert process.communicate(timeout=60)[0] == f"{code}\n"
    assert not child.is_running()
