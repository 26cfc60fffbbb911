"""Spans of a step: recorded, stored, read again, and drawn."""

import json
import time

import pytest
from matplotlib.figure import Figure
from verl.utils.profiler.performance import marked_timer

from verl_trb.gantt import LANES, NAMES, _rows, draw_gantt, main, write_gantt
from verl_trb.timeline import Span, Spans, StepTimeline, Timings, read_timeline, typical, write_step


def test_verls_timers_leave_spans_and_add_up():
    spans = Spans("trainer")
    timings = Timings(spans)
    began = time.time()
    with marked_timer("step", timings):
        with marked_timer("gen", timings):
            time.sleep(0.02)
        for _ in range(2):  # a timer that runs twice
            with marked_timer("update_actor", timings):
                time.sleep(0.01)
        timings["teacher"] = 0.004  # inside update_actor
    timings["testing"] = 3.0
    assert [span.name for span in spans.noted] == ["gen", "update_actor", "update_actor"]
    gen, first, second = spans.take()
    assert began <= gen.start < gen.end <= first.start < first.end <= second.start + 1e-3
    assert gen.end - gen.start == pytest.approx(timings["gen"], abs=1e-3)
    assert timings.parts() == pytest.approx(timings["gen"] + timings["update_actor"])
    assert 0 <= timings["step"] - timings.parts() < 0.02
    assert not spans.take()


def test_a_step_is_stored_relative_to_its_start_without_what_lies_outside(tmp_path):
    inside = Span("worker", "teacher", 101.0, 101.5)
    write_step(tmp_path, 7, 100.0, 102.0, [inside, Span("rollouts", "generate", 99.0, 101.0)])
    with open(tmp_path / "timeline.jsonl", "a") as file:
        file.write('{"step": 8, "sec')  # killed while it wrote
    assert read_timeline(tmp_path) == [StepTimeline(7, 2.0, [Span("worker", "teacher", 1.0, 1.5)])]
    assert read_timeline(tmp_path / "nothing") == []


def test_the_typical_step_is_the_median_one_and_never_the_first_of_several():
    steps = [StepTimeline(step, seconds, []) for step, seconds in ((1, 9.0), (2, 1.0), (3, 1.2), (4, 5.0))]
    assert typical(steps).step == 3
    assert typical(steps[:1]).step == 1


def test_spans_that_follow_one_another_share_a_row():
    spans = [Span("rollouts", "generate", 0, 1), Span("rollouts", "generate", 0, 1.2)]
    spans += [Span("rollouts", "reward", 1, 1.3), Span("rollouts", "reward", 1.2, 1.4)]
    assert _rows(spans) == [0, 1, 0, 1]


def test_every_span_is_drawn_in_its_lane(tmp_path):
    spans = [Span("trainer", "gen", 0.0, 0.5), Span("trainer", "update_actor", 0.5, 0.8)]
    spans += [
        Span("rollouts", "generate", 0.1, 0.4),
        Span("worker", "teacher", 0.55, 0.6),
        Span("new", "odd", 0.6, 0.7),
    ]
    axes = Figure().add_subplot()
    draw_gantt(axes, StepTimeline(3, 1.0, spans))
    assert len(axes.patches) == len(spans)
    assert sorted(round(bar.get_width(), 3) for bar in axes.patches) == [0.05, 0.1, 0.3, 0.3, 0.5]
    assert [label.get_text() for label in axes.get_yticklabels()] == [*LANES.values(), "new"]
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    assert shown == [NAMES[name][1] for name in ("gen", "update_actor", "generate", "teacher")]


def test_the_command_draws_a_run_and_says_what_is_missing(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2 and "has recorded no timeline yet" in capsys.readouterr().err
    line = {"step": 2, "seconds": 1.0, "spans": [["trainer", "gen", 0.0, 0.6]]}
    (tmp_path / "timeline.jsonl").write_text(json.dumps(line) + "\n")
    assert main([str(tmp_path)]) == 0 and (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert main([str(tmp_path), "--step", "5"]) == 2 and "no timeline of step 5" in capsys.readouterr().err
    assert write_gantt(tmp_path, tmp_path / "other.png").step == 2
