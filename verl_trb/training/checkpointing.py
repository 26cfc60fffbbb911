"""verl's trainer with checkpoints that are whole or absent.

verl writes into the final folder, prunes older checkpoints before the new one is complete, and loads what its tracker
file names. Here the folder gets its name when everything is on the disk (checkpoints.py), older ones go after that,
and the last complete one is loaded.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from verl_trb import checkpoints
from verl_trb.errors import ComponentLost, RunError
from verl_trb.faults import explain, innermost
from verl_trb.report.metrics import read_metrics
from verl_trb.run_folder import METRICS
from verl_trb.training.watch import WatchedTrainer

DATA = "data.json"  # where the data loader stands
LINE = "metrics.json"  # the step's line of metrics.jsonl, which is written when its weights are with the rollout engine
TENSOR = "uint8 tensor"


class CheckpointingTrainer(WatchedTrainer):
    """Saves and resumes. `step_line()`: what is known of the step's line of metrics.jsonl at its checkpoint.
    `write_rollouts()`: to trainer.rollout_data_dir, where that is set; the step is not drawn again.
    """

    step_line: Callable[[], dict[str, Any]]
    write_rollouts: Callable[[], None]

    def _save_checkpoint(self) -> None:
        root, step = Path(self.config.trainer.default_local_dir), self.global_steps
        before = checkpoints.find(root).step
        self.now(f"the checkpoint of step {step}")
        line, partial = self.step_line(), None
        try:
            self.write_rollouts()
            partial = checkpoints.begin(root, step)
            # max_ckpt_to_keep=None: verl would remove older ones before this one is complete.
            self.actor_rollout_wg.save_checkpoint(str(partial / "actor"), None, step, max_ckpt_to_keep=None)
            (partial / DATA).write_text(json.dumps(self.train_dataloader.state_dict(), default=_encode))
            (partial / LINE).write_text(json.dumps(line))
            folder = checkpoints.finish(partial)
            checkpoints.record(root, step)
        except Exception as error:
            if isinstance(explain(error), ComponentLost):
                raise
            free = shutil.disk_usage(root).free if root.exists() else 0
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
            raise RunError(_not_written(root, step, before, innermost(error), free)) from None
        self.checkpoint_callback.on_save(trainer=self, global_step=step, checkpoint_dir=str(folder), async_save=False)
        checkpoints.prune(root, self.config.trainer.max_actor_ckpt_to_keep, newest=step)

    def _load_checkpoint(self) -> None:
        trainer = self.config.trainer
        if trainer.resume_mode == "auto":
            found = checkpoints.find(Path(trainer.default_local_dir))
            for text in found.unusable:
                self.emit({"kind": "warning", "text": text})
            self.global_steps = found.step
            if found.newest is not None:
                self._load(found.newest)
        elif trainer.resume_mode == "resume_path" and (Path(trainer.resume_from_path) / checkpoints.MANIFEST).exists():
            folder = Path(trainer.resume_from_path)
            if reason := checkpoints.fault(folder):
                raise RunError(f"trainer.resume_from_path={folder} is not a complete checkpoint: {reason}")
            self.global_steps = int(folder.name.rpartition("_")[2])
            self._load(folder)
        else:
            super()._load_checkpoint()  # none, or one that verl itself has written

    def _load(self, folder: Path) -> None:
        self.actor_rollout_wg.load_checkpoint(local_path=str(folder / "actor"), del_local_after_load=False)
        state = json.loads((folder / DATA).read_text(), object_hook=_decode)
        self.train_dataloader.load_state_dict(state)
        if folder.parent == Path(self.config.trainer.default_local_dir) and (folder / LINE).exists():
            self._complete_metrics(json.loads((folder / LINE).read_text()))

    def append_line(self, line: dict[str, Any]) -> None:
        """To metrics.jsonl, whole or not at all."""
        with open(self.run_dir / METRICS, "a") as file:
            file.write(json.dumps(line) + "\n")

    def _complete_metrics(self, line: dict[str, Any]) -> None:
        """What a run loses that is killed between a checkpoint and its step's end: the line, and the validation."""
        try:
            recorded = {one["step"]: one for one in read_metrics(self.run_dir)}
        except ValueError:
            recorded = {}
        step, trainer = line["step"], self.config.trainer
        if step not in recorded:
            self.append_line(line)
        due = trainer.test_freq > 0 and (step % trainer.test_freq == 0 or step >= self.total_training_steps)
        if due and not any(name.startswith("val") for name in recorded.get(step, ())):
            trainer.val_before_train = True


def _not_written(root: Path, step: int, before: int, error: BaseException, free: int) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    left = f"the checkpoint of step {before} is intact" if before else "there is no earlier one"
    return (
        f"the checkpoint of step {step} could not be written to {root} ({lines[0]}; {free / 2**20:.0f} MiB were free "
        f"there): {left}; make room, then give the same command again, and the run goes on from there"
    )


def _encode(value: Any) -> Any:
    """For JSON: a generator's state, the one thing in a data loader's state that is not plain."""
    if isinstance(value, torch.Tensor) and value.dtype == torch.uint8:
        return {TENSOR: value.tolist()}
    raise TypeError(f"the data loader's state has a {type(value).__name__}, which JSON lacks")


def _decode(value: dict[str, Any]) -> Any:
    return torch.tensor(value[TENSOR], dtype=torch.uint8) if set(value) == {TENSOR} else value
