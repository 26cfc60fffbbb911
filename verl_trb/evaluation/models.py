"""What is evaluated: Hugging Face models, a run's student, its checkpoints, or a run with all of them.

    MODEL                       a Hugging Face folder or hub name, RUN/student among them
    RUN                         the student it started from (step 0) and every checkpoint
    RUN/checkpoints/global_step_N[/actor]
    NAME=any of these           under a name of one's own

A checkpoint of verl's FSDP engine becomes a Hugging Face folder first, in the cache, in the dtype of the model that
the run started from: bit for bit what the run would have exported. (verl's own merger rounds to bfloat16.)
"""

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from verl_trb.errors import UserError
from verl_trb.model_files import WEIGHTS, find_model, is_hub_name
from verl_trb.run_folder import CONFIG, STUDENT, exported, last_checkpoint
from verl_trb.tasks.prepare import Progress, make_once

STEP = re.compile(r"global_step_(\d+)")
FSDP = "fsdp_config.json"


@dataclass(frozen=True)
class Candidate:
    """One model. path: a Hugging Face folder or hub name, or the `actor` folder of a checkpoint; run and step: of a
    point of a learning curve.
    """

    name: str
    path: str
    checkpoint: bool = False
    run: str | None = None
    step: int | None = None

    @property
    def fingerprint(self) -> str:
        """Changes when the weights do: names, sizes and times of their files; a hub name is itself."""
        folder = Path(self.path)
        if not folder.is_dir():
            return self.path
        patterns = ("model_world_size_*.pt",) if self.checkpoint else WEIGHTS
        files = sorted(file for pattern in patterns for file in folder.glob(pattern))
        facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def candidates(arguments: list[str]) -> list[Candidate]:
    """What the arguments name, in order. Raises UserError, one sentence, for what is no model, or two of one name."""
    found = []
    for argument in arguments:
        name, _, path = argument.rpartition("=")
        if "/" in name:  # a path with "=" in it
            name, path = "", argument
        mine = _find(path)
        if name:
            mine = [replace(c, name=name if len(mine) == 1 else f"{name}@{c.step}", run=c.run and name) for c in mine]
        found += mine
    names = [candidate.name for candidate in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"Two models are called {twice[0]!r}; give one another name: NAME={found[-1].path}.")
    return found


def folder_of(candidate: Candidate, cache_dir: Path, progress: Progress) -> str:
    """Its Hugging Face folder or hub name; a checkpoint is turned into one, once. Raises UserError."""
    if not candidate.checkpoint:
        return candidate.path
    actor = Path(candidate.path)
    target = cache_dir.expanduser() / "merged" / f"{candidate.name.replace('/', '_')}-{candidate.fingerprint}"
    if not target.exists():
        progress(f"{candidate.name}: making a model folder of the checkpoint")
        try:
            make_once(target, lambda partial: convert(actor, partial), progress)
        except UserError:
            raise
        except (ValueError, RuntimeError, KeyError, OSError, EOFError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UserError(f"The checkpoint {actor} cannot be read ({reason}); is it whole?") from None
    return str(target)


def convert(actor: Path, target: Path) -> None:
    """Writes the model of an FSDP checkpoint as a Hugging Face folder; low-rank adapters are merged."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from verl_trb.training.export import save_student, source_dtype
    from verl_trb.training.lora import merged

    state = whole_state(actor)
    adapters = actor / "lora_train_meta.json"
    scale = 0.0
    if adapters.exists():
        facts = json.loads(adapters.read_text())
        scale = facts["lora_alpha"] / facts["r"]
    saved = actor / "huggingface"
    start = _start(actor.parent.parent.parent)
    dtype = source_dtype(Path(start) if start and (Path(start) / "config.json").is_file() else saved)
    defaults = GenerationConfig.from_pretrained(saved) if (saved / "generation_config.json").exists() else None
    tokenizer = AutoTokenizer.from_pretrained(saved)
    save_student(target, dict(merged(state, scale)), AutoConfig.from_pretrained(saved), dtype, tokenizer, defaults)


def whole_state(actor: Path) -> dict[str, Any]:
    """Every parameter of an FSDP2 checkpoint, its shards put together; sharded over ranks or, with replicas, groups.

    Raises UserError if a rank's file is missing, ValueError for a layout that is not FSDP's.
    """
    import torch
    from torch.distributed.tensor import DTensor

    ranks = int(json.loads((actor / FSDP).read_text())["world_size"])
    files = [actor / f"model_world_size_{ranks}_rank_{rank}.pt" for rank in range(ranks)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(f"The checkpoint {actor} of {ranks} ranks lacks {missing[0]}; copy the whole folder.")
    # On the CPU; the shards come with their device mesh, of which only the layout is read.
    states = [torch.load(file, map_location="cpu", weights_only=False) for file in files]
    whole = {}
    for name, first in states[0].items():
        if not isinstance(first, DTensor):
            whole[name] = first
            continue
        inner: Any
        *outer, inner = first.placements
        if not all(placement.is_replicate() for placement in outer):
            raise ValueError(f"{name} is sharded in more than one way, {first.placements}")
        group = first.device_mesh.mesh.shape[-1]
        shards = [state[name].to_local() for state in states[:group]]
        whole[name] = torch.cat(shards, dim=inner.dim) if inner.is_shard() else shards[0]
    return whole


def _find(path: str) -> list[Candidate]:
    folder = Path(path).expanduser()
    if is_hub_name(path):
        return [Candidate(path, path)]
    if not folder.is_dir():
        raise UserError(f"There is no model folder or run {path}; a model of the hub is OWNER/NAME.")
    if (folder / "checkpoints").is_dir() or (folder / CONFIG).is_file():
        return _run(folder)
    if STEP.fullmatch(folder.name):
        return [_checkpoint(folder / "actor")]
    if (folder / FSDP).is_file() or (STEP.fullmatch(folder.parent.name) and folder.name == "actor"):
        return [_checkpoint(folder)]
    if steps := _steps(folder):
        return [_checkpoint(step / "actor") for step in steps]
    if STEP.fullmatch(folder.parent.name):
        raise UserError(f"{path} is not the model of its checkpoint; give {folder.parent}.")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{path} holds an adapter without its model; merge it into the model first.")
    if folder.name == "huggingface" and not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        raise UserError(f"{path} is the configuration of a checkpoint without its weights; give {folder.parent}.")
    find_model("model", path)
    if folder.name == STUDENT and (folder.parent / CONFIG).is_file():
        run = folder.resolve().parent
        return [Candidate(f"{run.name}/{STUDENT}", str(folder), run=run.name, step=last_checkpoint(run))]
    return [Candidate(folder.resolve().name, str(folder))]


def _run(run: Path) -> list[Candidate]:
    steps = _steps(run / "checkpoints")
    if not steps:
        student = f"; its student is {run / STUDENT}" if exported(run) else ""
        raise UserError(f"The run {run} has no checkpoint{student}.")
    found = [_checkpoint(step / "actor") for step in steps]
    start = _start(run)
    if start and (is_hub_name(start) or (Path(start) / "config.json").is_file()):
        name = run.resolve().name
        found.insert(0, Candidate(f"{name}@0", start, run=name, step=0))
    return found


def _checkpoint(actor: Path) -> Candidate:
    """A checkpoint's `actor` folder. Raises UserError for one of another kind, or one that is not whole."""
    place = actor.resolve()
    match = STEP.fullmatch(place.parent.name)
    if not actor.is_dir():
        raise UserError(
            f"{actor.parent} has no folder `actor`; give a checkpoint of verl's, RUN/checkpoints/global_step_N."
        )
    if not (actor / FSDP).is_file():
        kind = "of Megatron" if (actor / "dist_ckpt").is_dir() else "of another kind"
        have = ", ".join(sorted(file.name for file in actor.iterdir())[:5]) or "nothing"
        raise UserError(
            f"{actor} is a checkpoint {kind}: it has no {FSDP} (it has {have}); only those of verl's FSDP engine can "
            "be read, others must be made a Hugging Face folder first (python -m verl.model_merger)."
        )
    if not any(actor.glob("model_world_size_*_rank_0.pt")):
        raise UserError(f"{actor} holds no weights (model_world_size_*_rank_0.pt); copy the whole checkpoint.")
    run = place.parent.parent.parent.name if match else place.name
    step = int(match[1]) if match else None
    return Candidate(
        f"{run}@{step}" if match else run, str(actor), checkpoint=True, run=run if match else None, step=step
    )


def _steps(folder: Path) -> list[Path]:
    """The folders global_step_N in a folder, by N."""
    steps = [step for step in folder.glob("global_step_*") if STEP.fullmatch(step.name)] if folder.is_dir() else []
    return sorted(steps, key=lambda step: int(step.name.rpartition("_")[2]))


def _start(run: Path) -> str | None:
    """The model that a run started from, by its config.yaml."""
    from omegaconf import OmegaConf

    try:
        return OmegaConf.select(OmegaConf.load(run / CONFIG), "actor_rollout_ref.model.path")
    except (OSError, ValueError):
        return None
