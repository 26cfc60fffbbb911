"""Everything that can be found wrong with a run before Ray starts: settings, models, data, machine.

A check takes the composed configuration and raises UserError, one sentence, or returns. `check` stops at the
first fault; `problems` collects them all for the dry run, apart from what is only absent from this machine.
"""

import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import psutil
from omegaconf import DictConfig

from verl_trb.agent_loops import check_agent_loop, check_agent_names
from verl_trb.data_files import check_lengths, check_responses, check_rows, check_special_tokens, files_of, read_rows
from verl_trb.errors import UserError
from verl_trb.model_files import Model, find_model
from verl_trb.ray_address import answers, cluster_address, cluster_record, recorded_cluster
from verl_trb.rewards.function import check_reward_function
from verl_trb.setting_checks import (
    ROLLOUT,
    check_batches,
    check_engine_sizes,
    check_environment,
    check_objective,
    check_platform,
    check_policy,
    check_sampling,
    check_verl_config,
    check_verl_settings,
)

GIB = 2**30
STUDENT, TEACHER = "actor_rollout_ref.model.path", "trb.teacher.path"
# float32 weights, gradients, and AdamW's two moments.
TRAINING_BYTES = 16
# float32 weights and AdamW's two moments.
CHECKPOINT_BYTES = 12
# Ray's services and the driver, trainer, worker, server and engine processes, beside weights and caches.
PROCESSES_BYTES = 3 * GIB
ELEMENT_BYTES = {"float32": 4, "fp32": 4, "bfloat16": 2, "bf16": 2, "float16": 2, "fp16": 2, "half": 2}


class Absent(UserError):
    """Something a run needs that is not on this machine; a dry run only mentions it."""


def check_models(config: DictConfig) -> None:
    """Both model folders are there, whole, and long enough for the sequences."""
    for key, model in models(config).items():
        if (
            model is not None
            and model.max_positions
            and model.max_positions < config.actor_rollout_ref.rollout.max_model_len
        ):
            raise UserError(
                f"{key}: the model reads at most {model.max_positions} tokens, but {ROLLOUT}.max_model_len="
                f"{config.actor_rollout_ref.rollout.max_model_len}; shorten prompts or responses."
            )


def check_tokenizers(config: DictConfig) -> None:
    """Student and teacher share one vocabulary (the first tokens that differ are named) that the policy fits."""
    from verl_trb.guidance import check_vocabulary
    from verl_trb.vocabulary import from_tokenizers

    student, teacher = models(config).values()
    if student is None or teacher is None:
        return
    try:
        vocabulary = from_tokenizers(
            _tokenizer(STUDENT, config.actor_rollout_ref.model.tokenizer_path or student.folder),
            _tokenizer(TEACHER, teacher.folder),
            student_rows=student.vocabulary_rows,
            teacher_rows=teacher.vocabulary_rows,
        )
        check_vocabulary(config.trb, vocabulary.size)
    except ValueError as error:
        raise UserError(str(error)) from None


def check_training_data(config: DictConfig) -> None:
    """Training prompts: files there, rows whole, no prompt too long or too short, enough for a batch."""
    _check_data(config, "train_files", config.data.train_batch_size)


def check_validation_data(config: DictConfig) -> None:
    """The same of the held-out prompts, of which one is enough."""
    _check_data(config, "val_files", 1)


def _check_data(config: DictConfig, key: str, needed: int) -> None:
    files = files_of(config.data[key])
    if not files:
        raise UserError(f"data.{key} is not set; give a parquet file in verl's format.")
    if missing := [file for file in files if not file.exists()]:
        names = ", ".join(map(str, missing))
        raise Absent(f"data.{key}: there is no file {names}{_how_to_make(missing)}.")
    rows = {file: read_rows(file) for file in files}
    for file in files:
        check_rows(file, rows[file], config.data)
        check_agent_names(file, rows[file], config)
        if key == "train_files" and config.trb.data_share != 0:
            check_responses(file, rows[file], config.trb.data_response)
    student = models(config)[STUDENT]
    if student is None:
        usable = sum(map(len, rows.values()))
    else:
        tokenizer = _tokenizer(STUDENT, config.actor_rollout_ref.model.tokenizer_path or student.folder)
        if template := config.actor_rollout_ref.model.custom_chat_template:
            tokenizer.chat_template = template
        for file in files:
            check_special_tokens(file, rows[file], config.data, tokenizer)
        usable = sum(check_lengths(file, rows[file], config.data, tokenizer) for file in files)
    if usable < needed:
        raise UserError(f"data.{key} has {usable} usable rows, fewer than the {needed} of a batch.")


def _how_to_make(files: list[Path]) -> str:
    """The command that makes data files with these names and in this folder, if there is one."""
    from verl_trb.data.sources import SOURCES
    from verl_trb.prepare_data import FOLDER

    folders = {file.parent for file in files}
    if len(folders) > 1 or any(file.suffix != ".parquet" or file.stem not in SOURCES for file in files):
        return ""
    elsewhere = "" if folders == {Path(FOLDER).expanduser()} else f" --out {folders.pop()}"
    names = " ".join(file.stem for file in files)
    return f"; make it with `python -m verl_trb.prepare_data {names}{elsewhere}`"


# ------------------------------------------------------------------------------------------ machine


def check_run_dir(config: DictConfig) -> None:
    """The run's folder can be written; nothing is left behind by trying."""
    folder = Path(config.trb.run_dir)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists() or parent.is_symlink())
    try:
        if not existing.is_dir():
            raise NotADirectoryError(20, f"{existing} is not a folder")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(
            f"trb.run_dir={folder} cannot be written ({error.strerror}); choose another folder with trb.run_dir=..."
        ) from None


def check_accelerators(config: DictConfig) -> None:
    """The GPUs that a recipe for GPUs counts on (one machine; on more, Ray knows)."""
    trainer = config.trainer
    if trainer.device == "cpu" or trainer.nnodes > 1 or os.environ.get("RAY_ADDRESS"):
        return
    import torch

    found = torch.cuda.device_count()
    if found < trainer.n_gpus_per_node:
        raise Absent(
            f"The recipe needs {trainer.n_gpus_per_node} GPUs and this machine has {found}; set "
            "trainer.n_gpus_per_node, or try recipe=quickstart, which runs on a CPU."
        )


def check_memory(config: DictConfig) -> None:
    """On a CPU: the KV cache holds at least one whole sequence, and everything together fits into memory."""
    both = [model for model in models(config).values() if model is not None]
    if config.trainer.device != "cpu" or len(both) < 2:
        return
    student, teacher = both
    rollout = config.actor_rollout_ref.rollout
    element = ELEMENT_BYTES.get(rollout.dtype, 4)
    per_token = sum(model.kv_bytes_per_token(element) for model in both)
    available, cache_bytes = psutil.virtual_memory().available, kv_cache_bytes(config)
    where = f"{ROLLOUT}.engine_kwargs.vllm.kv_cache_memory_bytes"
    if cache_bytes < per_token * rollout.max_model_len:
        raise UserError(
            f"The KV cache of {_gib(cache_bytes)} holds {cache_bytes // per_token} tokens, less than one "
            f"sequence of {rollout.max_model_len}; raise {where} to at least "
            f"{per_token * rollout.max_model_len}."
        )
    weights = [model.parameters or 0 for model in both]
    engine = element * sum(weights)
    training = TRAINING_BYTES * weights[0] + 4 * weights[1]
    needed = training + engine + cache_bytes + PROCESSES_BYTES
    if needed > available:
        raise UserError(
            f"Too little memory: {_gib(needed)} are needed (training {_gib(training)}, rollout engine "
            f"{_gib(engine)}, KV cache {_gib(cache_bytes)}, processes {_gib(PROCESSES_BYTES)}) and "
            f"{_gib(available)} are available; lower {where}, choose smaller models or end other programs."
        )


def check_disk(config: DictConfig) -> None:
    """Room for one checkpoint beside those there are, where the student's size is known."""
    student, folder = models(config)[STUDENT], Path(config.trainer.default_local_dir)
    if student is None or config.trainer.save_freq <= 0:
        return
    needed = CHECKPOINT_BYTES * (student.parameters or 0)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"A checkpoint needs {_gib(needed)} and {_gib(free)} are free in {existing}; make room, choose another "
            "folder with trb.run_dir=..., or set trainer.save_freq=-1 for none."
        )


def check_weight_bucket(config: DictConfig) -> None:
    """The student's largest weight, its embedding, fits into the bucket that carries weights to the engine."""
    student, actor = models(config)[STUDENT], config.actor_rollout_ref.actor
    if student is None:
        return
    size = student.vocabulary_rows * student.config["hidden_size"]
    size *= ELEMENT_BYTES.get(actor.fsdp_config.get("model_dtype") or "fp32", 4)
    key = f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes"
    bucket = config.actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes
    if size > bucket * 2**20:
        raise UserError(
            f"{key}={bucket} is too small for the student's embedding, {size / 2**20:.0f} MB; set it to at least "
            f"{-(-size // 2**20)}."
        )


def check_ray(config: DictConfig) -> None:
    """No dead Ray session in the way, and no other program on a port that was asked for."""
    ray_init = config.ray_kwargs.ray_init
    if config.trb.prefork and ray_init.get("address") != "local":
        raise UserError(
            "trb.prefork=true is for a Ray of its own on this machine; set ray_kwargs.ray_init.address=local, or "
            "trb.prefork=false."
        )
    if (named := os.environ.get("RAY_ADDRESS")) not in (None, "", "local", "auto") and not answers(named):
        raise UserError(f"RAY_ADDRESS={named} does not answer; unset it, or start that Ray cluster.")
    address = cluster_address(config)
    if address not in (None, "auto") and not answers(address):
        if address == recorded_cluster() and ray_init.get("address") is None:
            raise UserError(
                f"{cluster_record()} names a Ray session, {address}, that no longer answers; run `ray stop` or remove "
                "the file."
            )
        raise UserError(f"ray_kwargs.ray_init.address={address} does not answer; start that Ray cluster.")
    if address is None and config.trainer.nnodes > 1:
        raise Absent(
            f"trainer.nnodes={config.trainer.nnodes} needs a Ray cluster: start one with scripts/ray_cluster.sh, and "
            "submit the run to it with scripts/ray_submit.sh (docs/cluster.md)."
        )
    port = ray_init.get("dashboard_port")
    if port and ray_init.get("include_dashboard", True) is not False and not _free(int(port)):
        raise UserError(
            f"Port {port} (ray_kwargs.ray_init.dashboard_port) is taken by another program; choose another."
        )


# Those that look at the settings alone.
SETTING_CHECKS: tuple[Callable[[DictConfig], None], ...] = (
    check_policy,
    check_objective,
    check_sampling,
    check_verl_settings,
    check_batches,
    check_engine_sizes,
)
CHECKS: tuple[Callable[[DictConfig], None], ...] = (
    check_environment,
    *SETTING_CHECKS,
    check_run_dir,
    check_ray,
    check_accelerators,
    check_models,
    check_tokenizers,
    check_training_data,
    check_validation_data,
    check_reward_function,
    check_agent_loop,
    check_memory,
    check_disk,
    check_weight_bucket,
    check_verl_config,
    check_platform,
)


def check(config: DictConfig) -> None:
    """Runs every check; raises the first one's UserError."""
    for run in CHECKS:
        run(config)


def problems(config: DictConfig) -> tuple[list[str], list[str]]:
    """All faults of a run, and what is only absent from this machine: two lists of sentences."""
    found: dict[bool, dict[str, None]] = {False: {}, True: {}}
    for run in CHECKS:
        try:
            run(config)
        except UserError as error:
            found[isinstance(error, Absent)][str(error)] = None
    return list(found[False]), list(found[True])


# ------------------------------------------------------------------------------------------ facts


def models(config: DictConfig) -> dict[str, Model | None]:
    """Student and teacher by config key; None for a hub name whose model is not on this machine.

    On a CPU such a model is refused: nothing is downloaded behind the back of a small machine.
    """
    found: dict[str, Model | None] = {}
    for key, path in ((STUDENT, config.actor_rollout_ref.model.path), (TEACHER, config.trb.teacher.path)):
        found[key] = find_model(key, path)
        if found[key] is None and config.trainer.device == "cpu":
            raise UserError(f"{key}={path}: no such folder, and no model of that name in the cache of the hub.")
    return found


def kv_cache_bytes(config: DictConfig) -> int:
    """Size of the engine's KV cache on a CPU, by vLLM's rules."""
    environment = (config.ray_kwargs.ray_init.get("runtime_env") or {}).get("env_vars") or {}
    gib = environment.get("VLLM_CPU_KVCACHE_SPACE") or os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    if gib:
        return int(gib) * GIB
    rollout = config.actor_rollout_ref.rollout
    explicit = (rollout.engine_kwargs.get("vllm") or {}).get("kv_cache_memory_bytes")
    return int(explicit or rollout.gpu_memory_utilization * psutil.virtual_memory().total)


@cache
def _tokenizer(key: str, folder: Path | str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{key}: the tokenizer in {folder} cannot be loaded ({reason}).") from None


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
