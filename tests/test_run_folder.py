"""What a command means for the folder of its run."""

import json
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from verl_trb import checkpoints
from verl_trb.errors import UserError
from verl_trb.run_folder import CONFIG, METRICS, STUDENT, State, open_run


def config(run_dir: Path, **trb: object) -> DictConfig:
    trainer = {"resume_mode": "auto", "total_training_steps": 4}
    return OmegaConf.create({"trainer": trainer, "trb": {"run_dir": str(run_dir), "epsilon": 0.05, **trb}})


def record_step(run_dir: Path) -> None:
    (run_dir / METRICS).write_text(json.dumps({"step": 0}) + "\n")


def test_new_then_unfinished_then_finished(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert open_run(config(run_dir)) is State.NEW and (run_dir / CONFIG).exists()
    record_step(run_dir)
    assert open_run(config(run_dir)) is State.UNFINISHED
    checkpoints.finish(checkpoints.begin(run_dir / "checkpoints", 4))
    (run_dir / STUDENT).mkdir()
    (run_dir / STUDENT / "config.json").write_text("{}")
    assert open_run(config(run_dir)) is State.FINISHED
    longer = config(run_dir)
    longer.trainer.total_training_steps = 8
    assert open_run(longer) is State.UNFINISHED


def test_other_settings_are_refused_once_there_is_something_to_continue(tmp_path: Path) -> None:
    open_run(config(tmp_path))
    assert open_run(config(tmp_path, epsilon=0.01)) is State.NEW, "a run that failed at its start binds nobody"
    record_step(tmp_path)
    with pytest.raises(UserError, match="trb.epsilon=0.01, and this command says 0.02"):
        open_run(config(tmp_path, epsilon=0.02))
    assert OmegaConf.load(tmp_path / CONFIG).trb.epsilon == 0.01
    open_run(config(tmp_path, epsilon=0.01, cache_dir="elsewhere"))


def test_starting_anew_moves_the_earlier_run_aside(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    open_run(config(run_dir))
    record_step(run_dir)
    anew = config(run_dir, epsilon=0.01)
    anew.trainer.resume_mode = "disable"
    assert open_run(anew) is State.NEW
    assert not (run_dir / METRICS).exists() and (tmp_path / "run.1" / METRICS).exists()
