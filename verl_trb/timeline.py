"""What a step's time was spent on: spans of clock time by lane, one JSON line a step in the run's `timeline.jsonl`.

Processes note spans with `Spans`; the trainer collects them. Clocks are the machine's (`time.time`), so that lanes of
several processes can be laid side by side.
"""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

TIMELINE = "timeline.jsonl"
# Times of verl's trainer that are not parts of a step: the step itself, what is inside a part, what comes after it.
NOT_PARTS = ("step", "teacher", "testing", "between", "other")


class Span(NamedTuple):
    """`name` in `lane` from `start` to `end`, seconds."""

    lane: str
    name: str
    start: float
    end: float


class Spans:
    """Spans that a process has noted since they were last taken."""

    def __init__(self, lane: str) -> None:
        self.lane = lane
        self.noted: list[Span] = []

    def add(self, name: str, start: float, end: float) -> None:
        self.noted.append(Span(self.lane, name, start, end))

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        start = time.time()
        try:
            yield
        finally:
            self.add(name, start, time.time())

    def take(self) -> list[Span]:
        taken, self.noted = self.noted, []
        return taken


class Timings(dict[str, float]):
    """verl's dictionary of a step's timers, seconds by name, which notes when each of them ran.

    verl's timers set an entry to 0 before they add to it, when they end.
    """

    def __init__(self, spans: Spans) -> None:
        super().__init__()
        self.spans = spans

    def __setitem__(self, name: str, seconds: float) -> None:
        elapsed, now = seconds - self.get(name, 0.0), time.time()
        super().__setitem__(name, seconds)
        if elapsed > 0 and name not in NOT_PARTS:
            self.spans.add(name, now - elapsed, now)

    def parts(self) -> float:
        """Seconds of all parts together."""
        return sum(seconds for name, seconds in self.items() if name not in NOT_PARTS)


def write_step(folder: Path, step: int, start: float, end: float, spans: Iterable[Span]) -> None:
    """Append a step that ran from `start` to `end`, with the spans in it; times are stored relative to `start`."""
    inside = [span for span in spans if span.start >= start and span.end <= end]
    rows = [[span.lane, span.name, round(span.start - start, 4), round(span.end - start, 4)] for span in inside]
    with open(folder / TIMELINE, "a") as file:
        file.write(json.dumps({"step": step, "seconds": round(end - start, 4), "spans": rows}) + "\n")


class StepTimeline(NamedTuple):
    """A step of `seconds` and its spans, which start at 0."""

    step: int
    seconds: float
    spans: list[Span]


def read_timeline(folder: Path) -> list[StepTimeline]:
    """All whole lines of the run's file; none where there is no file."""
    if not (folder / TIMELINE).exists():
        return []
    steps = []
    for line in (folder / TIMELINE).read_text().splitlines():
        try:
            read = json.loads(line)
        except json.JSONDecodeError:  # a line cut by a crash
            continue
        steps.append(StepTimeline(read["step"], read["seconds"], [Span(*row) for row in read["spans"]]))
    return steps


def typical(steps: list[StepTimeline]) -> StepTimeline:
    """The step of median length; the first of a run, which warms up, only if there is no other."""
    ordered = sorted(steps[1:] or steps, key=lambda one: one.seconds)
    return ordered[len(ordered) // 2]
