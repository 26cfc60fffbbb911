"""Forked workers are what a new interpreter would be, and the template ends with its driver."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from verl_trb import prefork
from verl_trb.prefork import MODULES, template

WORKER = """
import json, os, sys
loaded = sorted({name.split(".")[0] for name in sys.modules} & {"torch", "vllm", "ray", "verl"})
facts = [__name__, sys.argv[1:], os.environ.get("FLAVOUR"), os.getcwd(), loaded, os.getppid()]
open(sys.argv[1], "w").write(json.dumps(facts))
print("printed by the worker")
"""


def start_worker(py_executable: str, folder: Path, result: Path) -> Path:
    """What Ray does: the command of py_executable, the worker's script and its arguments."""
    script, output = folder / "worker.py", folder / "output"
    script.write_text(WORKER)
    with output.open("w") as file:
        command = [*shlex.split(py_executable), str(script), str(result), "two words"]
        environment = {**os.environ, "FLAVOUR": "plain"}
        subprocess.run(command, stdout=file, stderr=file, cwd=folder, env=environment, check=True, timeout=60)
    for _ in range(600):
        if result.exists() and result.read_text().endswith("]"):
            return output
        time.sleep(0.1)
    pytest.fail(f"the worker did not run: {output.read_text()}")


@pytest.fixture(scope="module")
def py_executable(tmp_path_factory: pytest.TempPathFactory):
    log = tmp_path_factory.mktemp("template") / "log"
    with template({"OMP_NUM_THREADS": "1"}, str(log)) as command:
        yield command
    assert "Traceback" not in log.read_text()


def test_a_fork_is_what_a_new_interpreter_would_be(py_executable: str, tmp_path: Path):
    output = start_worker(py_executable, tmp_path, tmp_path / "result")
    name, arguments, flavour, folder, loaded, parent = json.loads((tmp_path / "result").read_text())
    assert (name, arguments, flavour) == ("__main__", [str(tmp_path / "result"), "two words"], "plain")
    assert folder == str(tmp_path)
    assert output.read_text() == "printed by the worker\n"
    assert loaded == ["torch", "vllm"], "Ray and verl read their environment when imported: not in the template"
    process = psutil.Process(parent)
    assert "verl_trb.prefork" in process.cmdline()
    names = {Path(f"/proc/{parent}/task/{thread.id}/comm").read_text().strip() for thread in process.threads()}
    # Threads do not survive a fork; jemalloc's (pyarrow's) is started again by its own handler.
    assert names - {"jemalloc_bg_thd"} == {process.name()} and process.num_threads() <= 2


def test_the_end_of_a_worker_ends_no_other(py_executable: str):
    """Ray sends SIGTERM to the process group of a dead worker; other runs' are forks of the same template."""
    driver = """
import os, signal, sys, time
import psutil, ray
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"py_executable": sys.argv[1]})

@ray.remote(num_cpus=1)
class Worker:
    def pid(self): return os.getpid()

first, second = Worker.remote(), Worker.remote()
pid, other = ray.get([first.pid.remote(), second.pid.remote()])
template = psutil.Process(pid).parent()
os.kill(pid, signal.SIGKILL)
try:
    ray.get(first.pid.remote())
except ray.exceptions.ActorDiedError:
    time.sleep(3)  # what Ray does then, it does at once
    print("alive:", "verl_trb.prefork" in template.cmdline(), ray.get(second.pid.remote()) == other)
ray.shutdown()
"""
    command = [sys.executable, "-c", driver, py_executable]
    process = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert "alive: True True" in process.stdout, process.stdout + process.stderr


PARENT = """
import json, multiprocessing, os, signal, sys, time
sys.path.insert(0, os.getcwd())
import child

if __name__ == "__main__":
    multiprocessing.set_executable(os.environ["VERL_TRB_EXECUTABLE"])
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    def start(what):
        process = context.Process(target=child.work, args=(theirs, what))
        process.start()
        return process, ours.recv()
    facts = {}
    process, facts["said"] = start("end")
    process.join()
    facts["ended"] = process.exitcode
    for name, stop in (("terminated", lambda p: p.terminate()), ("killed", lambda p: p.kill())):
        process, (_, pid, _) = start("wait")
        stop(process)
        process.join()
        facts[name] = process.exitcode
        deadline = time.time() + 20
        while os.path.exists(f"/proc/{pid}") and time.time() < deadline:
            time.sleep(0.05)
        facts[name + " is gone"] = not os.path.exists(f"/proc/{pid}")
    process, (_, pid, _) = start("wait")
    os.kill(pid, signal.SIGKILL)
    multiprocessing.connection.wait([process.sentinel], timeout=20)
    facts["seen to die"] = process.join() or process.exitcode
    facts["orphans"] = [start("wait")[1][1] for _ in range(2)]
    os.kill(facts["orphans"][1], signal.SIGSTOP)  # as one that hangs: it does nothing more by itself
    print(json.dumps(facts), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
CHILD = """
import os, signal, sys, time
import setproctitle

def work(connection, what):
    if what == "wait":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
    setproctitle.setproctitle("a title")
    with open("/proc/self/cmdline") as title:
        connection.send((title.read().strip(chr(0)), os.getpid(), "torch" in sys.modules))
    if what == "wait":
        time.sleep(600)
    sys.exit(3)
"""


def test_a_process_of_multiprocessing_is_a_fork(py_executable: str, tmp_path: Path):
    """Its pipes, exit codes and signals are as without a template, and it does not outlive its parent."""
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "child.py").write_text(CHILD)
    output = tmp_path / "output"
    command = shlex.split(py_executable)
    with output.open("w") as file:  # as Ray starts a worker
        subprocess.run([*command, str(tmp_path / "parent.py")], stdout=file, stderr=file, cwd=tmp_path, check=True)
    for _ in range(1800):
        if "orphans" in output.read_text():
            break
        time.sleep(0.1)
    facts = json.loads(output.read_text().strip().splitlines()[-1])
    title, _, imported = facts.pop("said")
    assert title == "a title", "nobody could tell vLLM's processes apart"
    assert imported, "torch was imported in the template"
    orphans = facts.pop("orphans")
    gone = {"terminated is gone": True, "killed is gone": True}
    assert facts == {"ended": 3, "terminated": 5, "killed": -signal.SIGKILL, "seen to die": 137, **gone}
    for _ in range(200):
        if not any(map(psutil.pid_exists, orphans)):
            break
        time.sleep(0.1)
    assert not any(map(psutil.pid_exists, orphans))


def test_without_a_template_the_client_becomes_the_worker(tmp_path: Path):
    with template({}, str(tmp_path / "log")) as command:
        pass
    start_worker(command, tmp_path, tmp_path / "result")
    assert json.loads((tmp_path / "result").read_text())[4] == []


def test_a_client_whose_fork_was_faster_becomes_no_second_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The fork closes the connection when it stands, which on a busy machine can be before the client goes on."""
    path, closed = str(tmp_path / "socket"), threading.Event()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()

    def fork() -> None:
        client, _ = listener.accept()
        message, streams = prefork._receive(client)
        for stream in streams:
            os.close(stream)
        client.close()
        closed.set()

    def slow(*args: object, send_fds=socket.send_fds) -> int:
        sent = send_fds(*args)
        assert closed.wait(30)
        return sent

    def second(*args: object) -> None:
        raise AssertionError("became the worker that the fork is")

    monkeypatch.setattr(prefork.socket, "send_fds", slow)
    monkeypatch.setattr(prefork.os, "execv", second)
    thread = threading.Thread(target=fork)
    thread.start()
    prefork.request(path, ["worker.py"])
    thread.join()
    listener.close()


def test_a_stand_in_whose_fork_is_lost_becomes_no_second_process(tmp_path: Path):
    """The fork may have read what its parent sent: the second would wait for it, and the parent for the second."""
    path, result = str(tmp_path / "socket"), tmp_path / "second"
    command = ["-c", f"open({str(result)!r}, 'w')  # {prefork.STARTS}"]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        client = subprocess.Popen([sys.executable, "-I", "-S", prefork.__file__, prefork.STAND_IN, path, *command])
        connection, _ = listener.accept()
        _, streams = prefork._receive(connection)
        for stream in streams:
            os.close(stream)
        connection.close()  # as when it was killed before it stood
        assert client.wait(timeout=30) == 1
    assert not result.exists()


def test_a_client_that_is_killed_while_it_asks_does_not_end_the_template(py_executable: str, tmp_path: Path):
    path = shlex.split(py_executable)[-1]
    for said in (b"", b'{"comm'):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            if said:
                client.sendall(said)
    start_worker(py_executable, tmp_path, tmp_path / "result")
    assert "torch" in json.loads((tmp_path / "result").read_text())[4]


def test_a_run_waits_for_its_processes_but_not_for_the_template(py_executable: str, tmp_path: Path):
    """Its forks; with a Ray of its own also the forks of a template that it shares, which are no children of it."""
    from verl_trb.launch import _processes

    (logs := tmp_path / "logs").mkdir()
    (script := tmp_path / "worker.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    printed = [logs / "fork.out", logs / "of another.out"]
    commands = [[*shlex.split(py_executable), str(script)], ["sh", "-c", f"{sys.executable} {script} &"]]
    for command, file in zip(commands, printed, strict=True):
        with file.open("w") as output:
            subprocess.run(command, stdout=output, check=True)
    for _ in range(300):
        if all(file.read_text().endswith("\n") for file in printed):
            break
        time.sleep(0.1)
    fork, other = (psutil.Process(int(file.read_text())) for file in printed)
    try:
        template_process = fork.parent()
        assert template_process in psutil.Process().children() and other not in psutil.Process().children()
        own, joined = _processes(logs), _processes(None)
        assert fork in own and other in own and template_process not in own
        assert fork in joined and other not in joined and template_process not in joined
    finally:
        for process in (fork, other):
            process.kill()


def test_the_template_ends_with_a_killed_driver(tmp_path: Path):
    driver = """
import sys, time
from verl_trb import prefork
prefork.MODULES = ()
with prefork.template({}, sys.argv[1]) as command:
    print(command, flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", driver, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    (child,) = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert psutil.wait_procs([child], timeout=60)[1] == []


def test_modules_exist():
    import importlib.util

    assert [name for name in MODULES if importlib.util.find_spec(name) is None] == []
