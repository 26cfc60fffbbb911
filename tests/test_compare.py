"""The comparison's command: its plan, what it refuses, and what it writes of runs that are there."""

import json
from pathlib import Path

import pytest

from verl_trb.compare import _seeds, main

ARMS = [
    "recipe=quickstart",
    "--seeds",
    "3",
    "--arm",
    "vanilla",
    "trb.policy=student",
    "--arm",
    "trb/a",
    "--arm",
    "trb/b",
]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Folders of finished runs, as the runs leave them: trb/b is better in validation, trb/a on the test split."""
    out = tmp_path / "comparison"
    gains = {"vanilla": (0.0, 0.0), "trb/a": (0.1, 0.2), "trb/b": (0.2, 0.1)}
    for arm, (gain, test_gain) in gains.items():
        for seed in range(3):
            folder = out / arm / f"seed-{seed}"
            (folder / "student").mkdir(parents=True)
            (folder / "student" / "config.json").write_text("{}")
            rows = [
                {"step": s, "val/accuracy": 0.1 + (0.3 + gain) * s / 20 + 0.01 * seed, "val/test": test_gain + s / 100}
                for s in (0, 10, 20)
            ]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def test_finished_runs_are_not_repeated_and_are_reported(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARMS, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "9 of 9 runs are finished" in said
    assert "| trb/b | 3 | 11.0 ± 0.6 | 36.0 ± 0.6 | 61.0 ± 0.6 | 61.0 ± 0.6 | 36.0 ± 0.6 |" in said
    assert "| trb/a | 3 | +0.0 ± 0.0 | +5.0 ± 0.0 | +10.0 ± 0.0 |" in said
    assert (out / "comparison.md").read_text() in said
    assert (out / "comparison.png").stat().st_size > 10_000
    assert json.loads((out / "comparison.json").read_text())["runs"]["vanilla"]["0"]["curve"]["20"] == pytest.approx(
        0.4
    )
    assert main(["--out", str(out)]) == 0, "the table of what is there needs no arms"


def test_overrides_may_stand_between_options(out: Path, capsys) -> None:
    assert main(["--out", str(out), *ARMS[:3], "trb.epsilon=0.1", *ARMS[3:]]) == 0
    plan = json.loads((out / "arms.json").read_text())
    assert plan["common"] == ["recipe=quickstart", "trb.epsilon=0.1"]
    assert plan["arms"]["vanilla"] == ["trb.policy=student"]


def test_settings_are_selected_on_one_split_and_reported_on_another(out: Path, capsys) -> None:
    assert main([*ARMS, "--out", str(out), "--select", "val/accuracy", "--metric", "val/test"]) == 0
    said = capsys.readouterr().out
    assert "selected by val/accuracy: vanilla, trb/b" in said and "| trb/a" not in said


def test_best_checkpoint_is_called_optimistic(out: Path, capsys) -> None:
    assert main([*ARMS, "--out", str(out), "--best-checkpoint"]) == 0
    assert "so too high" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Give recipe=NAME"),
        (["recipe=quickstart"], "Name the methods"),
        (["recipe=quickstart", "--arm", "a", "--arm", "a"], "same name"),
        (["recipe=quickstart", "--arm", "a", "--seeds", "two"], "a number or a list"),
        (["recipe=quickstart", "--arm", "a", "--seeds", "1,1"], "all different"),
        ([*ARMS, "--metric", "val/accuarcy"], "has no metric 'val/accuarcy'; it has val/accuracy, val/test"),
    ],
)
def test_wrong_commands_are_one_sentence(out: Path, capsys, arguments: list[str], says: str) -> None:
    where = ["--out", str(out)] if arguments else []
    assert main([*arguments, *where]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and says in said and "Traceback" not in said


def test_other_overrides_do_not_mix_with_a_comparison(out: Path, capsys) -> None:
    assert main([*ARMS, "--out", str(out)]) == 0
    other = ["recipe=quickstart", "--arm", "vanilla", "trb.policy=teacher", "--out", str(out)]
    assert main(other) == 2
    assert "other overrides" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "seeds"), [("3", [0, 1, 2]), ("3,", [3]), ("0,", [0]), ("7,3", [7, 3])])
def test_seeds_are_a_number_or_a_list(text: str, seeds: list[int]) -> None:
    assert _seeds(text) == seeds
