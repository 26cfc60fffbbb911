"""Fixtures that several test files share: a toy run's files, and the program refused or run in this process."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class ToyRun:
    """Untrained student and teacher of the table-walk task with its data files, and the folder they are in."""

    folder: Path

    @property
    def student(self) -> Path:
        return self.folder / "student"

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher"

    @property
    def train_file(self) -> Path:
        return self.folder / "train.parquet"

    @property
    def val_file(self) -> Path:
        return self.folder / "val.parquet"

    @property
    def overrides(self) -> list[str]:
        """The quickstart with these files, and its results beside them."""
        return [
            "recipe=quickstart",
            f"actor_rollout_ref.model.path={self.student}",
            f"trb.teacher.path={self.teacher}",
            f"data.train_files={self.train_file}",
            f"data.val_files={self.val_file}",
            f"trb.run_dir={self.folder}/run",
            f"trb.cache_dir={self.folder}/cache",
            "trb.prepare=null",
        ]

    def edit_rows(self, edit: Callable[[list[dict[str, Any]]], None]) -> Path:
        """A JSON-lines copy of the training file after `edit` has changed its list of rows."""
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(self.train_file).to_pylist()
        edit(rows)
        file = self.folder / "edited.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file


@pytest.fixture(scope="session")
def toy_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to copy: student, teacher, train.parquet (64 rows), val.parquet (8 rows)."""
    import torch

    from verl_trb.tasks import table_walk, toy_models
    from verl_trb.tasks.prepare import write_parquet

    folder = tmp_path_factory.mktemp("toy")
    train, val = table_walk.make_rows(64, 8, seed=1)
    write_parquet(folder / "train.parquet", train)
    write_parquet(folder / "val.parquet", val)
    torch.manual_seed(0)
    for name in ("student", "teacher"):
        model = toy_models.make_model(getattr(table_walk.SETTINGS, name), table_walk)
        toy_models.save(model, table_walk, folder / name)
    return folder


@pytest.fixture
def toy(toy_files: Path, tmp_path: Path) -> ToyRun:
    """A toy run of the test's own, to break as it likes."""
    shutil.copytree(toy_files, tmp_path, dirs_exist_ok=True)
    return ToyRun(tmp_path)


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the program with the arguments, in this process; it must refuse. Returns the sentence it says."""

    def run(*arguments: str) -> str:
        from verl_trb.main import main

        capsys.readouterr()
        assert main(list(arguments)) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and said[0].startswith("error: "), said
        return said[0].removeprefix("error: ")

    return run


@pytest.fixture(params=["kept", "computed again", "by blocks", "by blocks again"])
def gradient(request, monkeypatch):
    """What backward through the output layers does: the gradient kept in forward, or both models' logits once more.
    Each of them also with chunks that are looked at in blocks of a few tokens.
    """
    from verl_trb import chunked_loss

    if "again" in request.param:
        monkeypatch.setattr(chunked_loss, "KEPT_GRADIENT", 0)
    if "blocks" in request.param:
        monkeypatch.setattr(chunked_loss, "CPU_BLOCK", 40)
    return request.param
