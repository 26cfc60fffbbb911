"""What a user sees while a run goes on: header, stages, one live progress line, validations, results.

In a terminal: colours and one live region at the bottom. Anywhere else (CI, a file, a dumb terminal): plain
lines that say the same, without control characters. The trainer's events, plain dicts, go to `handle`.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from verl_trb.report import Summary

ACCENT, LABEL = "cyan", "bright_black"
MAX_WIDTH = 100  # of panels and stage lines: wider ones read badly
PLAIN_SECONDS = 10  # between plain lines of one stage
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class Display:
    """Use as a context manager: leaving it, also by an exception or Ctrl-C, restores the terminal.

    `file` defaults to standard output. `total_steps` is what `handle` assumes when a step event does not say.
    Plain output has a line for every `every`-th step, by default for about 20 steps of a run.
    """

    def __init__(self, file: TextIO | None = None, total_steps: int = 0, every: int | None = None) -> None:
        self.file = file or sys.stdout
        self.total_steps = total_steps
        self.every = every
        self.console = Console(file=self.file, highlight=False)
        utf8 = (getattr(self.file, "encoding", None) or "").lower().replace("-", "") == "utf8"
        capable = self.console.is_terminal and not self.console.is_dumb_terminal
        self.plain = not (self.file.isatty() and capable and utf8)
        self._born = time.monotonic()
        self._live: Live | None = None
        self._stage: tuple[str, float] | None = None  # text, start
        self._metrics: Mapping[str, Any] | None = None  # of the last step, while training
        self._stepped = self._training_since = 0.0
        self._seconds: deque[float] = deque(maxlen=10)  # of the last steps, for the time left
        self._blended = False
        self._warned: set[str] = set()
        self._stamp_text, self._stamp_time = "", 0.0  # of the last stamped line, in plain output

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        if kind is not None:
            where = f" at {self._position(self._metrics)}" if self._metrics else ""
            self._end_stage(ok=False)
            self.close()
            if issubclass(kind, KeyboardInterrupt):
                self._print(f"stopped{where}", self._marked("■", f"stopped{where}", "yellow"))
        self.close()

    def close(self) -> None:
        """Ends the live region; the lines above it stay."""
        self._end_stage(ok=True)
        self._metrics = None
        if self._live:
            self._live.stop()
            self._live = None

    def handle(self, event: Mapping[str, Any]) -> None:
        """Shows {"kind": "stage" | "warning" | "error", "text": …} or {"kind": "step", "metrics": …}."""
        match event["kind"]:
            case "step":
                self.step(event["metrics"], event.get("total_steps", self.total_steps))
            case "stage" | "warning" | "error" as kind:
                getattr(self, kind)(event["text"])
            case kind:
                raise ValueError(f"Unknown event kind {kind!r}: use 'stage', 'step', 'warning' or 'error'.")

    def header(self, rows: Mapping[str, str], title: str = "Trust-region behavior blending") -> None:
        """A panel with one row an entry: models, task, ε_0, K, γ, where the logs are, run folder."""
        if self.plain:
            return self._lines([title, *_columns(rows.items()), ""])
        self.console.print(self._panel(title, rows.items()))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A small table; the stage before it is over."""
        self._end_stage(ok=True)
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        lines = ["   ".join(map(str.ljust, row, widths)).rstrip() for row in (columns, *rows)]
        if self.plain:
            return self._lines(["", title, *lines, ""])
        text = Text.assemble((f"{title}\n", f"bold {ACCENT}"), (f"{lines[0]}\n", LABEL), "\n".join(lines[1:]))
        self.console.print(Padding(text, (1, 2)))

    def stage(self, text: str) -> None:
        """Something long begins, the stage before is over: a spinner, later a check mark and the seconds.

        A text with the same beginning up to its colon ("teacher: step 20", "teacher: step 40") is how far that
        stage has come: one line, the last text stays. Plain output has it at most every `PLAIN_SECONDS`.
        """
        now, head = time.monotonic(), text.partition(": ")[0]
        if self._stage and ": " in text and self._stage[0].partition(": ")[0] == head:
            self._stage = (text, self._stage[1])
            if self.plain and now - self._stamp_time >= PLAIN_SECONDS:
                self._stamped(text)
        else:
            self._end_stage(ok=True)
            self._stage = (text, now)
            if self.plain:
                self._stamped(text)
        if not self.plain:
            self._refresh()

    def step(self, metrics: Mapping[str, Any], total_steps: int) -> None:
        """A finished step, or the validation before training as step 0; `metrics` as in metrics.jsonl."""
        self._end_stage(ok=True)
        step, seconds = int(metrics["step"]), _number(metrics, "timing_s/step")
        self._stepped = time.monotonic()
        if self._metrics is None:
            self._training_since = self._stepped - (seconds or 0)
        self.total_steps, self._metrics = total_steps, metrics
        if seconds is not None:
            self._seconds.append(seconds)
        every = self.every or max(1, math.ceil(total_steps / 20))
        if self.plain and step > 0 and (step % every == 0 or step in (1, total_steps)):
            numbers = [f"{name} {value}" for name, value in _numbers(metrics)]
            self._stamped("  ".join([self._position(metrics), *numbers, *self._clock(metrics)]))
        self._milestones(step, metrics)
        if self.plain:
            return
        if step >= total_steps > 0:
            self._metrics = None
            self._done(f"trained {step} steps", self._stepped - self._training_since)
        self._refresh()

    def summary(
        self,
        result: Summary | Mapping[str, str],
        paths: Mapping[str, str | PathLike[str]],
        compare: str = "",
    ) -> None:
        """The results, where everything is, and the commands (one a line) that compare with vanilla OPD."""
        self.close()
        rows = list(result.items()) if isinstance(result, Mapping) else result_rows(result)
        places = _columns((name, str(path)) for name, path in paths.items())
        commands = [f"  {line}" for line in compare.splitlines()]
        if self.plain:
            heading = ["", "Compare with vanilla OPD:"] if commands else []
            return self._lines(["", "Results", *_columns(rows), "", *places, *heading, *commands])
        self.console.print(self._panel("Results", rows))
        # Paths and commands are for copying: no frame around them, and never wrapped.
        for line in places:
            self.console.print(Text(f"  {line}"), soft_wrap=True)
        if commands:
            self.console.print(Text("\n  compare with vanilla OPD", style=LABEL))
            for line in commands:
                self.console.print(Text(f"  {line}", style=ACCENT), soft_wrap=True)

    def warning(self, text: str) -> None:
        """A line that stays; the same warning is shown once."""
        if text not in self._warned:
            self._warned.add(text)
            self._print(f"warning: {text}", self._marked("!", text, "yellow"))

    def error(self, text: str) -> None:
        """A line that stays, after the live region has been ended: an error is the end of a run."""
        self._end_stage(ok=False)
        self.close()
        self._print(f"error: {text}", self._marked("✘", text, "red"))

    # Parts of the picture

    def _milestones(self, step: int, metrics: Mapping[str, Any]) -> None:
        """The lines that stay: a validation, and the end of the warm-up."""
        epsilon, accuracy = _number(metrics, "trb/epsilon"), _number(metrics, "val/accuracy")
        name = f"step {step:>{len(str(self.total_steps))}}"
        if self._blended and epsilon == 0:
            text = "warm-up over, the student samples alone"
            self._print(f"step {step}  {text}", Text.assemble("  ", (name, LABEL), "   ", text), stamp=True)
        if epsilon is not None:
            self._blended = epsilon > 0
        if accuracy is not None:
            line = Text.assemble("  ", (name, LABEL), "   accuracy ", (f"{accuracy:6.1%}", "bold"), "   ")
            line.append_text(_bar(accuracy, 24, "green"))
            self._print(f"step {step}  accuracy {accuracy:.1%}", line, stamp=True)

    def _clock(self, metrics: Mapping[str, Any]) -> list[str]:
        """The time a step takes, as the mean of the last ones, and what is left of the training."""
        if not self._seconds:
            return []
        mean = sum(self._seconds) / len(self._seconds)
        left = mean * (self.total_steps - int(metrics["step"])) - (time.monotonic() - self._stepped)
        remaining = duration(left) if left >= 10 else f"{left:.0f} s"
        return [f"{duration(mean)}/step", f"{remaining} left"] if left >= 1 else [f"{duration(mean)}/step"]

    def _position(self, metrics: Mapping[str, Any]) -> str:
        return f"step {metrics['step']}/{self.total_steps}" if self.total_steps else f"step {metrics['step']}"

    def _render(self) -> RenderableType:
        """The live region: the running stage and, while training, the progress in a line (two if narrow)."""
        width = self.console.width - 3  # room for the ^C a terminal echoes: a wrapped line is never erased
        lines: list[RenderableType] = []
        now, stage, metrics = time.monotonic(), self._stage, self._metrics
        spinner = Text(SPINNER[int(10 * now) % len(SPINNER)], style=ACCENT)
        if stage:
            lines.append(self._wide(Text.assemble("  ", spinner, " ", stage[0]), now - stage[1], width))
        if metrics is not None:
            head = Text.assemble("  ", " " if stage else spinner, f" {self._position(metrics)}  ")
            share = int(metrics["step"]) / max(self.total_steps, 1)
            numbers, clock = Text(), Text()
            for name, value in _numbers(metrics):
                numbers.append(f"   {name} ", LABEL).append(value, "bold")
            for value in self._clock(metrics):
                clock.append(f"   {value}", LABEL)
            room = width - head.cell_len - clock.cell_len
            if room - numbers.cell_len >= 12:
                lines.append(head + _bar(share, min(room - numbers.cell_len, 40), ACCENT) + numbers + clock)
            else:
                lines += [head + _bar(share, max(room, 4), ACCENT) + clock, Text(" ") + numbers]
            for line in lines[-2:]:
                if isinstance(line, Text):
                    line.truncate(width, overflow="ellipsis")
        return Group(*lines)

    def _panel(self, title: str, rows: Iterable[tuple[str, str]]) -> Padding:
        grid = Table.grid(padding=(0, 3, 0, 0))
        grid.add_column(style=LABEL, no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in rows:
            grid.add_row(Text(name), Text(value, style="bold" if name == "accuracy" else ""))
        width = min(self.console.width, MAX_WIDTH)
        heading = Text(title, style=f"bold {ACCENT}")
        look: Any = {"title_align": "left", "border_style": LABEL, "padding": (1, 2)}
        return Padding(Panel(grid, title=heading, width=width, **look), (1, 0))

    def _wide(self, text: Text, seconds: float, width: int) -> Table:
        """A stage's line, its seconds flush right."""
        grid = Table.grid(padding=(0, 0, 0, 1), expand=True)
        grid.width = min(width, MAX_WIDTH)
        grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        grid.add_column(justify="right", style=LABEL, no_wrap=True)
        grid.add_row(text, duration(seconds) if seconds >= 0.1 else "")
        return grid

    def _marked(self, mark: str, text: str, style: str) -> Table:
        """A message with a mark before it, and no line of it under the mark."""
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_row(" ", Text(mark, style=f"bold {style}"), Text(text, style=style))
        return grid

    def _done(self, text: str, seconds: float, ok: bool = True) -> None:
        if self._live:
            self._live.refresh()  # or else what is done would flash up once more below its own line
        mark = ("✔", "green") if ok else ("✘", "red")
        self.console.print(self._wide(Text.assemble("  ", mark, " ", text), seconds, self.console.width))

    def _end_stage(self, ok: bool) -> None:
        stage, self._stage = self._stage, None
        if stage and self.plain and stage[0] != self._stamp_text and ok:
            self._stamped(stage[0])  # how the stage ended
        if stage and not self.plain:
            self._done(stage[0], time.monotonic() - stage[1], ok)

    def _refresh(self) -> None:
        if self._live is None:
            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=8, transient=True)
            self._live.start()
        self._live.refresh()

    # Output

    def _print(self, plain: str, styled: RenderableType, stamp: bool = False) -> None:
        if not self.plain:
            self.console.print(styled)
        elif stamp:
            self._stamped(plain)
        else:
            self._lines([plain])

    def _stamped(self, text: str) -> None:
        self._stamp_text, self._stamp_time = text, time.monotonic()
        minutes, seconds = divmod(int(time.monotonic() - self._born), 60)
        self._lines([f"[{minutes:2}:{seconds:02}] {text}"])

    def _lines(self, lines: Iterable[str]) -> None:
        encoding = getattr(self.file, "encoding", None) or "utf-8"
        for line in lines:
            print(line.encode(encoding, "replace").decode(encoding), file=self.file, flush=True)


def result_rows(result: Summary) -> list[tuple[str, str]]:
    """The results as (name, value), without what the run did not record."""
    rows = []
    first, last, best = result.accuracy_first, result.accuracy_last, result.accuracy_best
    if first and last and last.step > first.step:
        gain = 100 * (last.value - first.value)
        rows.append(("accuracy", f"{first.value:.1%} → {last.value:.1%}   {gain:+.1f} points"))
    elif last:
        rows.append(("accuracy", f"{last.value:.1%}"))
    if best and last and best.value > last.value:
        rows.append(("best", f"{best.value:.1%} at step {best.step}"))
    if result.reverse_kl_first and result.reverse_kl_last:
        values = (significant(result.reverse_kl_first.value), significant(result.reverse_kl_last.value))
        rows.append(("reverse KL", f"{values[0]} → {values[1]} nats per token"))
    if result.acceptance is not None:
        rows.append(("acceptance", f"{result.acceptance:.1%} of the student's drafts during warm-up"))
    if result.total_seconds is not None and result.step_seconds is not None:
        each = f"{result.steps} steps, {duration(result.step_seconds)} each"
        rows.append(("time", f"{duration(result.total_seconds)}   {each}"))
    if result.total_tokens:
        rows.append(("tokens", count(result.total_tokens)))
    return rows


def duration(seconds: float) -> str:
    """0.92 s, 42 s, 3:25 min, 1:02 h."""
    if seconds < 9.95:
        return f"{seconds:#.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    (large, small), unit = (divmod(whole, 60), "min") if whole < 3600 else (divmod(whole // 60, 60), "h")
    return f"{large}:{small:02} {unit}"


def significant(value: float, digits: int = 3) -> str:
    """0.0313, 0.412, 1.92, 1,204: about `digits` digits, a width that does not jump from step to step."""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:#.{digits}g}".rstrip(".")


def count(value: float) -> str:
    """950, 12.3k, 4.56M, 7.89B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{significant(value / size)}{unit}"
    return f"{value:.0f}"


def _numbers(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the progress line says of a step, as (name, value); what was not recorded is left out."""
    epsilon, acceptance = _number(metrics, "trb/epsilon"), _number(metrics, "trb/acceptance")
    loss, reward = _number(metrics, "trb/reverse_kl"), _number(metrics, "reward/mean")
    numbers = [] if epsilon is None else [("ε", significant(epsilon, 2))]
    numbers += [] if loss is None else [("reverse KL", significant(loss))]
    numbers += [] if reward is None else [("reward", f"{reward:.2f}")]
    # Without a trust region nothing is verified: every draft is accepted, which says nothing.
    numbers += [] if acceptance is None or epsilon == 0 else [("acceptance", f"{acceptance:.1%}")]
    return numbers


def _number(metrics: Mapping[str, Any], key: str) -> float | None:
    value = metrics.get(key)
    return float(value) if isinstance(value, int | float) else None


def _columns(rows: Iterable[tuple[str, str]]) -> list[str]:
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    return [f"{name:<{width}}   {value}" for name, value in rows]


def _bar(share: float, width: int, style: str) -> Text:
    full = round(min(max(0.0, share), 1.0) * width)  # in this order NaN is 0
    return Text.assemble(("━" * full, style), ("─" * (width - full), LABEL))
