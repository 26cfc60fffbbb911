"""The report reads what runs leave behind (killed, resumed, half-written) and draws what is there."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from verl_trb.report import COLORS, Point, draw_report, points, read_metrics, run_label, summary
from verl_trb.report.__main__ import main
from verl_trb.report.metrics import guidance_end, guided, time_parts
from verl_trb.report.panels import loss

SIZE = (1600, 2400)


def trb_rows(steps: int = 12, warmup: int = 8) -> list[dict]:
    """A run by hand: ε falls to 0 at step 8, accuracy rises to 0.6, the loss falls from 2 to 0.02 nats."""
    rows: list[dict] = [{"step": 0, "val/accuracy": 0.05, "timing_s/testing": 3.0}]
    for k in range(1, steps + 1):
        epsilon = max(0.0, 0.1 * (1 - (k - 1) / (warmup - 1)))
        row = {"step": k, "reward/mean": 0.05 * k, "trb/reverse_kl": 2.0 * 0.01 ** ((k - 1) / (steps - 1))}
        row |= {"trb/epsilon": epsilon, "trb/kl/mean": 0.6 * epsilon, "trb/kl/max": epsilon}
        row |= {"timing_s/step": 1.5, "trb/beta/mean": 4 * epsilon, "trb/acceptance": 0.9 if epsilon else 1.0}
        row |= {"trb/tokens_per_teacher_pass": 3.5 if epsilon else 0.0, "perf/total_num_tokens": 1000}
        if k % 4 == 0:
            row |= {"val/accuracy": {4: 0.3, 8: 0.7, 12: 0.6}[k], "timing_s/testing": 2.0}
        rows.append(row)
    return rows


def student_rows() -> list[dict]:
    keep = ("step", "val/accuracy", "reward/mean", "trb/reverse_kl", "timing_s/step")
    return [{key: row[key] for key in keep if key in row} for row in trb_rows()]


def write_run(folder: Path, rows: list[dict], policy: str | None = None) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if policy:
        (folder / "config.yaml").write_text(f"trb:\n  policy: {policy}\n  epsilon: 0.1\n  warmup_steps: 8\n")
    return folder


def panels_with(picture: Path, color: str) -> list[bool]:
    """Whether a line in this colour is to be seen in each of the four panels (the legend is above them)."""
    pixels = imread(picture)
    assert pixels.shape[:2] == SIZE
    hit = np.abs(pixels[..., :3] - np.array(to_rgb(color))).max(-1) < 0.01
    rows, columns = (slice(320, 800), slice(1000, 1500)), (slice(150, 1090), slice(1330, 2260))
    return [int(hit[r, c].sum()) > 200 for r in rows for c in columns]


# Reading


def test_half_a_line_at_the_end_is_ignored(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [{"step": 1, "x": 1.0}, {"step": 2, "x": 2.0}])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "x": 3')
    assert read_metrics(run) == [{"step": 1, "x": 1.0}, {"step": 2, "x": 2.0}]


def test_a_resumed_run_may_write_behind_half_a_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [{"step": 1, "x": 1.0}])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "x"{"step": 2, "x": 5.0}\n')
    assert read_metrics(run) == [{"step": 1, "x": 1.0}, {"step": 2, "x": 5.0}]


def test_after_a_resume_the_last_value_of_a_step_counts(tmp_path: Path) -> None:
    rows = [{"step": s, "x": 1.0} for s in (1, 2, 3, 4)] + [{"step": 3, "x": 7.0}, {"step": 4, "x": 8.0}]
    got = read_metrics(write_run(tmp_path / "run", rows))
    assert [(row["step"], row["x"]) for row in got] == [(1, 1.0), (2, 1.0), (3, 7.0), (4, 8.0)]


def test_steps_past_the_resumption_belong_to_the_killed_run(tmp_path: Path) -> None:
    rows = [{"step": s, "val/accuracy": 0.9} for s in (1, 2, 3, 4)] + [{"step": 3, "val/accuracy": 0.4}]
    metrics = read_metrics(write_run(tmp_path / "run", rows))
    assert summary(metrics).accuracy_last == Point(3, 0.4)


def test_the_validation_before_a_resumed_step_keeps_that_steps_training_metrics(tmp_path: Path) -> None:
    rows = [{"step": 2, "reward/mean": 0.5}, {"step": 2, "val/accuracy": 0.4}, {"step": 3, "x": 0.6}]
    got = read_metrics(write_run(tmp_path / "run", rows))
    assert got == [{"step": 2, "reward/mean": 0.5, "val/accuracy": 0.4}, {"step": 3, "x": 0.6}]


def test_lines_that_are_no_steps_are_skipped(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('\nnull\n[1]\n{"x": 1}\nworker says hello\n{"step": 4, "loss": NaN}\n')
    metrics = read_metrics(run)
    assert [row["step"] for row in metrics] == [4]
    assert points(metrics, "loss") == []


# The numbers


def test_summary() -> None:
    got = summary(trb_rows())
    assert got.steps == 12
    assert (got.accuracy_first, got.accuracy_last, got.accuracy_best) == ((0, 0.05), (12, 0.6), (8, 0.7))
    assert got.reverse_kl_first == (1, 2.0)
    assert got.reverse_kl_last is not None and got.reverse_kl_last.value == pytest.approx(0.02)
    assert got.acceptance == pytest.approx(0.9)  # not diluted by the 1.0 of the steps without a trust region
    assert got.step_seconds == pytest.approx(1.5)
    assert got.total_seconds == pytest.approx(12 * 1.5 + 3 * 2.0 + 3.0)
    assert got.total_tokens == 12000


def test_summary_of_what_was_not_recorded_is_none() -> None:
    got = summary([{"step": 3}])
    assert got.steps == 3
    assert {value for name, value in vars(got).items() if name != "steps"} == {None}


def test_policies_without_epsilon_guide_until_it_is_said_to_be_zero() -> None:
    rows = [{key: v for key, v in row.items() if key != "trb/epsilon" or v == 0} for row in trb_rows(warmup=8)]
    assert [row["step"] for row in guided(rows)] == [1, 2, 3, 4, 5, 6, 7] and guidance_end(rows) == 8
    assert guidance_end(rows[:6]) is None and guided(student_rows()) == []


def test_the_warmup_ends_at_the_first_step_without_a_trust_region() -> None:
    assert guidance_end(trb_rows(warmup=8)) == 8
    assert guidance_end(trb_rows(steps=12, warmup=40)) is None
    assert guidance_end(student_rows()) is None
    assert guidance_end([{"step": 1, "trb/epsilon": 0.0}, {"step": 2, "trb/epsilon": 0.0}]) is None


@pytest.mark.parametrize(
    ("config", "label"),
    [
        ("trb: {policy: trb, epsilon: 0.05, warmup_steps: 30}", "TRB ε₀=0.05 K=30"),
        ("trb: {policy: trb, epsilon: 5e-05, warmup_steps: 30}", "TRB ε₀=5e-05 K=30"),
        ("trb: {policy: student, epsilon: 0.05, warmup_steps: 30}", "vanilla OPD (student rollouts)"),
        ("trb: {policy: skd, epsilon: 0.05, warmup_steps: 30}", "skd"),
        (
            "trb: {policy: temperature, method: temperature_warmup, epsilon: 0.05, warmup_steps: 30}",
            "temperature_warmup",
        ),
        ("trb: {policy: /home/me/mine.py:either, epsilon: 0.05, warmup_steps: 30}", "either"),
        ("trb: {policy: trb}", "my-run"),
        ("trb: [", "my-run"),
        ("", "my-run"),
    ],
)
def test_label(tmp_path: Path, config: str, label: str) -> None:
    run = tmp_path / "my-run"
    run.mkdir()
    (run / "config.yaml").write_text(config)
    assert run_label(run) == label


# The picture


def test_a_run_shows_in_all_four_panels(tmp_path: Path) -> None:
    draw_report([write_run(tmp_path / "run", trb_rows(), "trb")], tmp_path / "new" / "report.png")
    assert panels_with(tmp_path / "new" / "report.png", COLORS[0]) == [True] * 4
    assert panels_with(tmp_path / "new" / "report.png", COLORS[1]) == [False] * 4
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.png"]


def test_a_student_run_has_no_lines_where_it_has_no_values(tmp_path: Path) -> None:
    draw_report([write_run(tmp_path / "run", student_rows(), "student")], tmp_path / "report.png")
    assert panels_with(tmp_path / "report.png", COLORS[0]) == [True, False, False, True]


def test_two_runs_in_one_picture(tmp_path: Path) -> None:
    blended = write_run(tmp_path / "blended", trb_rows(), "trb")
    rows = [row | {"trb/reverse_kl": 3 * row.get("trb/reverse_kl", 1)} for row in student_rows()]
    rows = [row | {"val/accuracy": row["val/accuracy"] / 2} if "val/accuracy" in row else row for row in rows]
    draw_report([blended, write_run(tmp_path / "vanilla", rows, "student")], tmp_path / "two.png")
    assert panels_with(tmp_path / "two.png", COLORS[0]) == [True] * 4
    assert panels_with(tmp_path / "two.png", COLORS[1]) == [True, False, False, True]


@pytest.mark.parametrize("rows", [[{"step": 0, "val/accuracy": 0.1}], trb_rows()[:2], [{"step": 7}]])
def test_a_run_of_one_step_can_be_drawn(tmp_path: Path, rows: list[dict]) -> None:
    draw_report([write_run(tmp_path / "run", rows)], tmp_path / "report.png")
    assert imread(tmp_path / "report.png").shape[:2] == SIZE


def drawn_loss(values: list[float]) -> Axes:
    axes = Figure().subplots()
    loss(axes, [[{"step": i, "trb/reverse_kl": value} for i, value in enumerate(values)]])
    return axes


@pytest.mark.parametrize(
    ("values", "scale"),
    [([2.0, 0.1], "log"), ([2.0, 0.5], "linear"), ([2.0, 0.0], "linear"), ([2.0, -0.1], "linear")],
)
def test_the_loss_has_a_log_axis_when_it_spans_a_decade(values: list[float], scale: str) -> None:
    assert drawn_loss(values).get_yscale() == scale


def test_a_long_run_is_smoothed_by_a_centred_mean() -> None:
    values = [1.5 + (-1) ** i for i in range(200)]
    raw, smooth = (np.asarray(line.get_ydata(), float) for line in drawn_loss(values).get_lines())
    np.testing.assert_allclose(raw, values)
    naive = [np.mean([values[j] for j in range(200) if abs(i - j) <= 4]) for i in range(200)]
    np.testing.assert_allclose(smooth, naive)


# A step's time


def test_the_parts_of_a_steps_time_are_means_and_sum_to_the_step() -> None:
    rows: list[dict] = [{"step": 0, "timing_s/testing": 9.0}]
    for step in (1, 2):
        row = {"step": step, "timing_s/step": 10.0, "timing_s/gen": 4.0, "timing_s/update_actor": 3.0}
        rows.append(row | {"timing_s/teacher": 1.0, "timing_s/update_weights": 0.5})
    rows[2]["timing_s/save_checkpoint"] = 2.0
    parts = {"rollouts": 4, "teacher": 1, "update": 2, "weight sync": 0.5, "checkpoint": 1, "other": 1.5}
    assert time_parts(rows) == pytest.approx(parts) and sum(parts.values()) == 10
    assert time_parts(rows[:1]) == {}


# The command


def test_command_writes_into_the_first_run(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a", trb_rows()), write_run(tmp_path / "b", student_rows())
    command = [sys.executable, "-m", "verl_trb.report", str(first), str(second)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    written = [first / name for name in ("report.html", "report.png", "report-details.png")]
    assert done.stdout.strip() == f"wrote {', '.join(map(str, written))}"
    assert done.stderr == ""
    assert all(imread(picture).shape[:2] == SIZE for picture in written[1:])
    assert sorted(path.name for path in second.iterdir()) == ["metrics.jsonl"]


def test_command_writes_where_it_is_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", trb_rows())
    assert main([str(run), "--out", str(tmp_path / "new" / "b")]) == 0
    assert (tmp_path / "new" / "b" / "report.html").exists() and not (run / "report.html").exists()


def test_command_errors_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, cut = tmp_path / "empty", tmp_path / "cut"
    empty.mkdir()
    cut.mkdir()
    (cut / "metrics.jsonl").write_text('{"step": 1, "va')
    run, file = write_run(tmp_path / "run", trb_rows()), tmp_path / "file"
    file.write_text("")
    for arguments, words in (
        ([tmp_path / "gone"], "gone is not a run folder: there is no such folder."),
        ([empty], "empty has no metrics.jsonl: "),
        ([cut], "holds no finished step yet"),
        ([run, tmp_path / "gone"], "gone is not a run folder"),
        ([run, "--out", file / "report"], "file"),
    ):
        assert main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and words in error and error.count("\n") == 1
        assert error.endswith(".\n")
    assert not [*tmp_path.rglob("*.png"), *tmp_path.rglob("*.html")]
