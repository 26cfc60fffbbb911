"""`dry_run=true`: what a run would do, in tables, and every problem that can be found without starting it.

Needs no GPU, downloads nothing, writes nothing and does not start Ray.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from omegaconf import DictConfig, ListConfig, open_dict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from verl_trb import preflight
from verl_trb.data_files import files_of
from verl_trb.errors import UserError
from verl_trb.model_files import Model, find_model
from verl_trb.placement import COLUMNS, layout, node_rows, shown, weight_bytes
from verl_trb.preflight import ELEMENT_BYTES, TRAINING_BYTES
from verl_trb.rollout.engine_args import batched_tokens, model_length
from verl_trb.schedules import warmup_factor
from verl_trb.setting_checks import batch_table

WIDTH = 110


def show(config: DictConfig, file: TextIO | None = None) -> int:
    """Prints the tables and the problems. Returns 2 if something would stop the run, else 0.

    A model, a data file or GPUs that only this machine lacks are mentioned and do not count.
    """
    notes = fill_in_prepared(config)
    wrong, absent = preflight.problems(config)
    if notes:
        # Nothing of the task is here yet: its models and data cannot be missing.
        missing = (preflight.STUDENT, preflight.TEACHER, "data.train_files", "data.val_files")
        wrong = [text for text in wrong if not text.startswith(tuple(f"{key} is not set" for key in missing))]
    console = Console(file=file or sys.stdout, highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    console.print(Text.assemble("Dry run of recipe ", (config.trb.recipe, "bold cyan"), ": nothing is started"))
    for make in (_models, _data, _batches, _placement, _schedules, _engine):
        console.print()
        console.print(make(config))
    console.print()
    for text in [*notes, *absent]:
        console.print(Text.assemble(("not on this machine: ", "yellow"), text), soft_wrap=True)
    for text in wrong:
        console.print(Text.assemble(("problem: ", "bold red"), text), soft_wrap=True)
    if not wrong:
        console.print(Text("no problems found", "green"))
    return 2 if wrong else 0


def fill_in_prepared(config: DictConfig) -> list[str]:
    """Paths of a task that was made before; otherwise says that its first run makes it."""
    task = config.trb.prepare
    if not task:
        return []
    from verl_trb.main import prepare, task_settings
    from verl_trb.tasks.prepare import folder_of

    if not folder_of(task, config.trb.cache_dir, task_settings(config)).exists():
        return [f"models and data of {task}: made at first use, in {Path(config.trb.cache_dir).expanduser()}"]
    with open_dict(config):
        prepare(config, lambda line: None)
    return []


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.show_header = any(columns)
    for number, column in enumerate(columns):
        table.add_column(column, style="bright_black" if number == 0 else "", overflow="fold")
    return table


def _models(config: DictConfig) -> Table:
    table = _table("Models", "", "path", "parameters", "layers", "heads/kv", "hidden", "vocabulary")
    paths = {"student": (preflight.STUDENT, config.actor_rollout_ref.model.path)}
    paths["teacher"] = (preflight.TEACHER, config.trb.teacher.path)
    for role, (key, path) in paths.items():
        try:
            model = find_model(key, path)
        except UserError:  # listed below
            model = None
        shown = str(path or f"made by task {config.trb.prepare}")
        table.add_row(role, shown, *(_facts(model) if model else ["not on this machine"]))
    return table


def _facts(model: Model) -> list[str]:
    size = f"{model.parameters:,}" if model.parameters else "no weights here"
    return [
        size,
        str(model.layers),
        model.heads,
        f"{model.config['hidden_size']:,}",
        f"{model.vocabulary_rows:,}",
    ]


def _data(config: DictConfig) -> Table:
    table = _table("Data", "", "files", "tokens, at most")
    limits = {"train_files": "max_prompt_length", "val_files": "max_response_length"}
    for (key, limit), what in zip(limits.items(), ("a prompt", "a response"), strict=True):
        files = ", ".join(map(str, files_of(config.data[key]))) or "none"
        if not config.data[key] and config.trb.prepare:
            files = f"made by task {config.trb.prepare}"
        table.add_row(key.removesuffix("_files"), files, f"{what} {config.data[limit]:,}")
    return table


def _batches(config: DictConfig) -> Table:
    table = _table("Batches", "", "")
    for name, value in batch_table(config).items():
        table.add_row(name, f"{value:,}")
    actor = config.actor_rollout_ref.actor
    micro = (
        f"up to {actor.ppo_max_token_len_per_gpu:,} tokens a device"
        if actor.use_dynamic_bsz
        else f"{actor.ppo_micro_batch_size_per_gpu} sequences a device"
    )
    table.add_row("micro-batch", micro)
    trainer = config.trainer
    steps = f"{trainer.total_training_steps:,}" if trainer.total_training_steps else f"{trainer.total_epochs} epochs"
    table.add_row("training steps", steps)
    table.add_row("validation, checkpoint every", f"{trainer.test_freq}, {trainer.save_freq} steps")
    return table


def _placement(config: DictConfig) -> Table:
    table = _table(f"Placement ({config.trb.placement})", *COLUMNS)
    for row in shown(placement_rows(config)):
        table.add_row(*row)
    return table


def placement_rows(config: DictConfig, addresses: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """What lives on each node, see placement.py; the weights' bytes where both models are on this machine.

    addresses: of the nodes in the order of ranks, where they are known.
    """
    plan, actor, offload = layout(config), config.actor_rollout_ref.actor, config.trb.teacher.offload
    try:
        sizes = [model.parameters or 0 if model else 0 for model in preflight.models(config).values()]
    except UserError:  # listed elsewhere
        sizes = [0]
    memory = None
    if all(sizes):
        trained = ELEMENT_BYTES.get(config.trb.teacher.dtype or actor.fsdp_config.get("model_dtype") or "fp32", 4)
        rollout = ELEMENT_BYTES.get(config.trb.teacher.dtype or config.actor_rollout_ref.rollout.dtype, 2)
        elements = {"training": TRAINING_BYTES, "teacher_element": trained, "engine_element": rollout}
        memory = weight_bytes(plan, *sizes, **elements, offload=offload)
    return node_rows(plan, addresses, memory, offload)


def _schedules(config: DictConfig) -> Table:
    from verl_trb.guidance import check_guidance, describe, guidance, last_guided_step

    trb, optim = config.trb, config.actor_rollout_ref.actor.optim
    try:
        check_guidance(trb)
    except ValueError:  # listed below
        return _table(f"Schedules ({trb.policy})")
    turns = {1, 2, max(optim.lr_warmup_steps, 0) + 1}
    schedules = [value for value in trb.policy_params.values() if isinstance(value, ListConfig)]
    turns |= {max(1, round(step)) for points in schedules for step, _ in points}
    if last := last_guided_step(trb):
        turns |= {max(last // 2, 1), last, last + 1}
    steps = sorted(turns | {max(config.trainer.total_training_steps or 0, *turns)})
    table = _table(f"Schedules ({describe(trb)})", "step", *map(str, steps))
    values = [guidance(trb, step) for step in steps]
    table.add_row("rollouts", *("student" if value is None else "guided" for value in values))
    for name in next(filter(None, values), {}):
        unit = "ε, nats a token" if name == "epsilon" else name
        table.add_row(unit, *("" if value is None else f"{value[name]:.3g}" for value in values))
    if optim.lr_scheduler_type == "constant":
        warmup = max(optim.lr_warmup_steps, 0)
        rates = (optim.lr * warmup_factor(step - 1, warmup, config.trb.lr_warmup) for step in steps)
        table.add_row("learning rate", *(f"{rate:.2g}" for rate in rates))
    else:
        table.add_row("learning rate", f"{optim.lr:g}, {optim.lr_scheduler_type} after {optim.lr_warmup_steps} steps")
    return table


def _engine(config: DictConfig) -> Table:
    rollout, data, drafts = config.actor_rollout_ref.rollout, config.data, config.trb.draft_tokens
    table = _table(f"Rollout engine (γ = {drafts} draft tokens)", "", "set", "at least")
    length = model_length(data.max_prompt_length, data.max_response_length, drafts)
    table.add_row("max_num_seqs", f"{rollout.max_num_seqs:,}", "1")
    needed = batched_tokens(rollout.max_num_seqs, drafts)
    table.add_row("max_num_batched_tokens", f"{rollout.max_num_batched_tokens:,}", f"{needed:,}")
    table.add_row("max_model_len", f"{rollout.max_model_len:,}", f"{length:,}")
    table.add_row("tensor_model_parallel_size", str(rollout.tensor_model_parallel_size), "1")
    return table
