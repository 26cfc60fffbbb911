"""The display: exact plain lines where output is no terminal, and a sane terminal where it is one."""

import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from verl_trb.display import SPINNER, Display, count, duration, result_rows, significant
from verl_trb.report import Point, Summary

ROOT = Path(__file__).parents[1]


def step(number: int, **values: float) -> dict:
    names = {"epsilon": "trb/epsilon", "loss": "trb/reverse_kl", "acceptance": "trb/acceptance"}
    names |= {"reward": "reward/mean", "accuracy": "val/accuracy", "seconds": "timing_s/step"}
    return {"step": number, **{names[name]: value for name, value in values.items()}}


def lines(file: io.StringIO) -> list[str]:
    """What was written, without the time stamps."""
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", file.getvalue()), "control characters in plain output"
    return [re.sub(r"^\[ *\d+:\d\d\] ", "", line) for line in file.getvalue().splitlines()]


# Plain output


def test_progress_within_a_stage_is_its_first_and_last_line() -> None:
    file = io.StringIO()
    with Display(file) as display:
        for text in ("teacher: step 20/60", "teacher: step 40/60", "teacher: 95%", "student: step 1", "checking"):
            display.stage(text)
    assert lines(file) == ["teacher: step 20/60", "teacher: 95%", "student: step 1", "checking"]


def test_a_whole_run_as_plain_lines() -> None:
    file = io.StringIO()
    with Display(file, total_steps=4) as display:
        display.header({"student": "0.10M", "trust region": "ε₀ = 0.05"})
        display.handle({"kind": "stage", "text": "starting Ray"})
        display.handle({"kind": "stage", "text": "starting the rollout engine"})
        display.handle({"kind": "step", "metrics": step(0, accuracy=0.0521)})
        blended = step(1, epsilon=0.05, loss=1.234, reward=0.25, acceptance=0.934, seconds=20.0)
        display.handle({"kind": "step", "metrics": blended})
        display.handle({"kind": "warning", "text": "2 rollouts were resubmitted [/b]"})
        pure = step(2, epsilon=0.0, loss=0.04567, reward=0.5, acceptance=1.0, seconds=10.0, accuracy=0.356)
        display.handle({"kind": "step", "metrics": pure})
        display.handle({"kind": "stage", "text": "exporting the student"})
        compare = "python -m verl_trb.main trb.policy=student\npython -m verl_trb.report a b"
        places: dict[str, str | Path] = {"picture": Path("runs/x/report.png"), "run": "runs/x"}
        display.summary({"accuracy": "5% → 36%"}, places, compare)
    assert lines(file) == [
        "Trust-region behavior blending",
        "student        0.10M",
        "trust region   ε₀ = 0.05",
        "",
        "starting Ray",
        "starting the rollout engine",
        "step 0  accuracy 5.2%",
        "step 1/4  ε 0.050  reverse KL 1.23  reward 0.25  acceptance 93.4%  20 s/step  1:00 min left",
        "warning: 2 rollouts were resubmitted [/b]",
        "step 2/4  ε 0  reverse KL 0.0457  reward 0.50  15 s/step  30 s left",
        "step 2  warm-up over, the student samples alone",
        "step 2  accuracy 35.6%",
        "exporting the student",
        "",
        "Results",
        "accuracy   5% → 36%",
        "",
        "picture   runs/x/report.png",
        "run       runs/x",
        "",
        "Compare with vanilla OPD:",
        "  python -m verl_trb.main trb.policy=student",
        "  python -m verl_trb.report a b",
    ]


def test_missing_and_undefined_metrics_are_no_problem() -> None:
    file = io.StringIO()
    display = Display(file, every=1)
    display.step({"step": 1}, 3)
    display.step({"step": 2, "trb/reverse_kl": float("nan"), "reward/mean": None, "trb/acceptance": "?"}, 3)
    display.step({"step": 7}, 0)
    assert lines(file) == ["step 1/3", "step 2/3  reverse KL nan", "step 7"]


def test_the_end_of_the_warmup_is_said_once_and_only_if_there_was_one() -> None:
    with_warmup, without = io.StringIO(), io.StringIO()
    for file, epsilons in ((with_warmup, (0.1, 0.05, 0.0, 0.0)), (without, (0.0, 0.0, 0.0, 0.0))):
        display = Display(file)
        for number, epsilon in enumerate(epsilons, start=1):
            display.step(step(number, epsilon=epsilon), 4)
    assert [line for line in lines(with_warmup) if "over" in line] == [
        "step 3  warm-up over, the student samples alone"
    ]
    assert "over" not in without.getvalue()


@pytest.mark.parametrize(("every", "shown"), [(None, [1, *range(20, 401, 20)]), (150, [1, 150, 300, 400])])
def test_a_long_run_does_not_flood_a_log(every: int | None, shown: list[int]) -> None:
    file = io.StringIO()
    display = Display(file, every=every)
    for number in range(1, 401):
        display.step(step(number), 400)
    assert lines(file) == [f"step {number}/400" for number in shown]


def test_a_warning_is_shown_once_and_an_error_is_one_line() -> None:
    file = io.StringIO()
    with Display(file) as display:
        for text in ("slow", "slow", "hot"):
            display.warning(text)
        display.error("No such folder: [models/teacher].")
    assert lines(file) == ["warning: slow", "warning: hot", "error: No such folder: [models/teacher]."]


def test_ctrl_c_says_how_far_the_run_got() -> None:
    file = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Display(file) as display:
        display.step(step(3), 9)
        raise KeyboardInterrupt
    assert lines(file)[-1] == "stopped at step 3/9"


def test_an_unknown_event_is_refused() -> None:
    with pytest.raises(ValueError, match="Unknown event kind 'progress'"):
        Display(io.StringIO()).handle({"kind": "progress", "text": "…"})


def test_a_terminal_without_unicode_still_gets_its_lines() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    Display(file).step(step(1, epsilon=0.05, reward=1.0), 1)
    assert raw.getvalue().endswith(b"step 1/1  ? 0.050  reward 1.00\n")


# Results and numbers


def test_results() -> None:
    result = Summary(
        steps=40, accuracy_first=Point(0, 0.052), accuracy_last=Point(40, 0.677),
        accuracy_best=Point(35, 0.7), reverse_kl_first=Point(1, 1.92), reverse_kl_last=Point(40, 0.0213),
        acceptance=0.934, step_seconds=0.92, total_seconds=72.4, total_tokens=1_234_567,
    )  # fmt: skip
    assert result_rows(result) == [
        ("accuracy", "5.2% → 67.7%   +62.5 points"),
        ("best", "70.0% at step 35"),
        ("reverse KL", "1.92 → 0.0213 nats per token"),
        ("acceptance", "93.4% of the student's drafts during warm-up"),
        ("time", "1:12 min   40 steps, 0.92 s each"),
        ("tokens", "1.23M"),
    ]


def test_results_without_what_was_not_recorded() -> None:
    nothing: dict[str, Any] = dict.fromkeys(Summary.__annotations__, None) | {"steps": 3}
    assert result_rows(Summary(**nothing)) == []
    once = nothing | dict.fromkeys(("accuracy_first", "accuracy_last", "accuracy_best"), Point(0, 0.5))
    assert result_rows(Summary(**once)) == [("accuracy", "50.0%")]
    worse = once | {"accuracy_last": Point(9, 0.4)}
    assert result_rows(Summary(**worse))[0] == ("accuracy", "50.0% → 40.0%   -10.0 points")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0478, "0.048 s"), (0.92, "0.92 s"), (1.0, "1.0 s"), (9.94, "9.9 s"), (9.96, "10 s"),
     (59.6, "1:00 min"), (205, "3:25 min"), (3599.7, "1:00 h"), (3725, "1:02 h"), (400 * 3600, "400:00 h")],
)  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.03125, "0.0312"), (0.4, "0.400"), (1.916, "1.92"), (12.34, "12.3"), (99.96, "100"),
     (1204.3, "1,204"), (-0.5, "-0.500"), (float("nan"), "nan")],
)  # fmt: skip
def test_significant(value: float, text: str) -> None:
    assert significant(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (950, "950"), (12_345, "12.3k"), (7.894e9, "7.89B")])
def test_count(value: float, text: str) -> None:
    assert count(value) == text


# A real terminal

SCRIPT = """
import json, signal, sys, time
from verl_trb.display import Display
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that it is ignored
with Display(total_steps=20) as display:
    for name, argument in json.loads(sys.argv[1]):
        if name == "sleep":
            time.sleep(argument)
        elif name == "raise":
            raise RuntimeError(argument)
        elif name == "print":
            print(argument)
        else:
            getattr(display, name)(*argument)
"""


class Terminal:
    """Runs calls of a Display in a process whose standard output is a pseudo-terminal of the given width."""

    def __init__(self, calls: list[tuple], columns: int = 80, environment: dict[str, str] | None = None) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.before = termios.tcgetattr(self.slave)
        kept = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
        kept |= {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"} | (environment or {})
        command = [sys.executable, "-c", SCRIPT, json.dumps(calls)]
        quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, stdout=self.slave, env=kept, cwd=ROOT, **quiet)
        self.text = ""

    def read_until(self, words: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while words not in self.text:
            assert time.monotonic() < end, f"{words!r} did not appear in {self.text!r}"
            self.text += os.read(self.master, 65536).decode(errors="replace")

    def finish(self) -> int:
        """Reads to the end; returns the exit code and checks that the terminal is as it was."""
        self.after = termios.tcgetattr(self.slave)
        os.close(self.slave)
        while True:
            try:
                chunk = os.read(self.master, 65536)
            except OSError:  # the other side is closed
                break
            self.text += chunk.decode(errors="replace")
        os.close(self.master)
        code = self.process.wait(timeout=30)
        assert self.after == self.before
        hidden, shown = self.text.rfind("\x1b[?25l"), self.text.rfind("\x1b[?25h")
        assert shown >= hidden, "the cursor was hidden and not shown again"
        return code

    def lines(self) -> list[str]:
        """Every line written, live or lasting, without control sequences."""
        text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.text)
        return [line.rstrip() for line in re.split(r"[\r\n]+", text)]


RUN: list[tuple] = [
    ("header", [{"student": "Qwen3 shape", "logs": "runs/" + "long-name-" * 12}]),
    ("stage", ["starting the rollout engine (teacher verifies what the student drafts), for a while"]),
    ("sleep", 0.3),
    ("step", [step(0, accuracy=0.05), 20]),
    ("print", "a stray line of somebody else"),
    ("step", [step(9, epsilon=0.05, loss=1.234, reward=0.25, acceptance=0.934, seconds=20.0), 20]),
    ("sleep", 0.3),
    ("warning", ["the cache is small [/b] " * 6]),
    ("step", [step(20, epsilon=0.0, loss=0.5, reward=0.5, seconds=20.0, accuracy=0.5), 20]),
    ("stage", ["exporting"]),
    ("summary", [{"accuracy": "5% → 50%"}, {"run": "runs/" + "x" * 150}, "python -m verl_trb.report a b"]),
]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_in_a_terminal(columns: int) -> None:
    terminal = Terminal(RUN, columns)
    assert terminal.finish() == 0
    shown = terminal.lines()
    path = "  run   runs/" + "x" * 150
    assert path in shown  # whole, for copying: never wrapped
    assert max(cell_len(line) for line in shown if line != path) <= columns
    live = [line for line in shown if set(SPINNER) & set(line) or line.startswith("    ε")]
    assert live and max(cell_len(line) for line in live) <= columns - 3  # an echoed ^C must not wrap
    text = "\n".join(shown)
    assert "╭─ Trust-region behavior blending ─" in text and "╭─ Results ─" in text
    assert re.search(r"(?m)✔ starting the rollout engine .*\d s$", text)
    assert re.search(r"step 9/20  ━+─+", text) and "reverse KL 1.23" in text
    assert re.search(r"20 s/step   3:\d\d min left", text)
    assert "step  0   accuracy   5.0%" in text
    assert "step 20   accuracy  50.0%   ━━━━━━━━━━━━────────────" in text
    assert "✔ trained 20 steps" in text and "✔ exporting" in text
    assert "a stray line of somebody else" in text and "[/b]" in text
    one_line = any("step 9/20" in line and "acceptance 93.4%" in line for line in shown)
    assert one_line == (columns == 120)


def test_ctrl_c_leaves_the_terminal_sane() -> None:
    terminal = Terminal([("step", [step(3, seconds=1.0), 20]), ("stage", ["validating"]), ("sleep", 60)])
    terminal.read_until("validating")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.finish() != 0
    assert "■ stopped at step 3/20" in "\n".join(terminal.lines())
    assert "✘ validating" in "\n".join(terminal.lines())


def test_a_crash_leaves_the_terminal_sane() -> None:
    terminal = Terminal([("stage", ["starting Ray"]), ("raise", "no memory")])
    assert terminal.finish() == 1
    assert "✘ starting Ray" in "\n".join(terminal.lines())


def test_an_error_fails_the_running_stage() -> None:
    terminal = Terminal([("stage", ["loading"]), ("error", ["No such folder: [models/teacher]."])])
    assert terminal.finish() == 0
    last = [line for line in terminal.lines() if line][-2:]
    assert last == ["  ✘ loading", "  ✘ No such folder: [models/teacher]."]


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"PYTHONIOENCODING": "ascii"}])
def test_a_poor_terminal_gets_plain_lines(environment: dict[str, str]) -> None:
    terminal = Terminal(RUN, environment=environment)
    assert terminal.finish() == 0
    assert "\x1b" not in terminal.text and "━" not in terminal.text
    assert "step 20  accuracy 50.0%" in terminal.text


def test_colors_forced_by_the_environment_do_not_reach_a_file() -> None:
    environment = os.environ | {"FORCE_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(RUN)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT)
    assert "\x1b" not in done.stdout and "step 20  accuracy 50.0%" in done.stdout


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, verl_trb.display, verl_trb.report as _; "
    code += "print(*{'verl', 'vllm', 'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""
