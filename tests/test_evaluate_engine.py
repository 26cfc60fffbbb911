"""The whole evaluation with the real vLLM on a toy model: the same numbers however it is cut into commands."""

import json
from pathlib import Path

import engine  # noqa: F401  sets the environment that one process with several engines needs
import pytest
from conftest import ToyRun

from verl_trb.evaluate import main
from verl_trb.evaluation.samples import Sample


@pytest.fixture
def command(toy: ToyRun) -> list[str]:
    return [str(toy.student), "--data", str(toy.val_file), "--max-tokens", "25", "--seed", "5"]


def read(out: Path) -> dict[tuple[str, int], Sample]:
    """All samples in a folder."""
    samples = {}
    for file in out.glob("student/*.jsonl"):
        for line in file.read_text().splitlines()[1:]:
            sample = Sample(**json.loads(line))
            samples[f"{file.stem} {sample.id}", sample.number] = sample
    return samples


def test_the_same_seed_gives_the_same_numbers(
    command: list[str], toy: ToyRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """At once; and in three commands of which the second finds the first's file cut off in a line, the third adds."""
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert main([*command, "--n", "3", "--out", str(whole)]) == 0
    assert main([*command, "--n", "2", "--limit", "2", "--out", str(pieces)]) == 0
    (file,) = pieces.glob("student/table_walk.jsonl")
    file.write_bytes(file.read_bytes()[:-20])
    assert main([*command, "--n", "3", "--out", str(pieces)]) == 0
    shown = capfd.readouterr().out
    assert f"{file} ended in half a line" in shown
    expected = read(whole)
    assert len(expected) == 8 * 3 and read(pieces) == expected
    assert len({sample.text for sample in expected.values()}) > 8  # no two samples of a problem share a seed
    assert all(sample.tokens <= 25 and sample.finish in ("stop", "length") for sample in expected.values())
    results = [json.loads((out / "results.json").read_text())["models"] for out in (whole, pieces)]
    assert results[0] == results[1]
    assert {name for name in results[0][0]["sets"]} == {"table_walk", "table_walk_selection"}
    assert (whole / "results.png").exists() and "student" in (whole / "results.md").read_text()
    # Nothing is left to draw: no engine starts.
    assert main([*command, "--n", "3", "--out", str(pieces)]) == 0
    assert "student: all samples are there" in capfd.readouterr().out
    # The run went on: the same folder, with other weights.
    weights = toy.student / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert main([*command, "--n", "3", "--out", str(pieces)]) == 2
    assert "holds samples made with model=" in capfd.readouterr().err


def test_too_long_for_the_model(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command[:3], "--max-tokens", "100000", "--out", str(tmp_path / "out")]) == 2
    assert "The model student reads at most " in (said := capsys.readouterr().err) and "; lower it by " in said
