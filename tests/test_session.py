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


SLEEPERS = """
import json, sys, time
from pathlib import Path
import verl_trb.main
from verl_trb import session

folder, jobs, runs = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

def run(arguments):
    (folder / f"began-{arguments[0]}").touch()
    try:
        while not (folder / "go").exists():
            time.sleep(0.02)
    except KeyboardInterrupt:
        return 130
    return int(arguments[0])

verl_trb.main.main = run
commands = [([str(number)], folder / f"screen-{number}") for number in range(runs)]
print(json.dumps(sorted(session.run_each(commands, jobs))))
"""


def sleepers(folder: Path, jobs: int, runs: int) -> subprocess.Popen:
    """`runs` commands in a session of its own, each of which sleeps until the file `go`; `jobs` have begun."""
    command = [sys.executable, "-c", SLEEPERS, str(folder), str(jobs), str(runs)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    for _ in range(600):
        if len(list(folder.glob("began-*"))) >= jobs:
            break
        time.sleep(0.1)
    time.sleep(0.3)  # a run too many would begin now
    assert len(list(folder.glob("began-*"))) == jobs
    return process


def test_runs_side_by_side_are_as_many_as_asked_for(tmp_path: Path) -> None:
    process = sleepers(tmp_path, jobs=2, runs=5)
    (tmp_path / "go").touch()
    assert json.loads(process.communicate(timeout=60)[0]) == [[number, number] for number in range(5)]


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_runs_first_and_no_other_begins(number: int, code: int, jobs: int, tmp_path: Path) -> None:
    """SIGTERM comes to the parent alone and is passed on; Ctrl-C comes to all."""
    process = sleepers(tmp_path, jobs, runs=3)
    children = psutil.Process(process.pid).children()
    if number == signal.SIGTERM:
        process.send_signal(number)
    else:
        os.killpg(process.pid, number)
    assert json.loads(process.communicate(timeout=60)[0]) == [[index, code] for index in range(jobs)]
    assert len(children) == jobs and not any(child.is_running() for child in children)
