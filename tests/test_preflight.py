"""Bad input: each fault of settings, models, data or machine is one sentence, exit code 2, and nothing is written."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import ToyRun
from omegaconf import DictConfig, OmegaConf

from verl_trb import composition, preflight
from verl_trb.errors import UserError
from verl_trb.model_files import is_hub_name, safetensors_header

Check = Callable[[DictConfig], None]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch):
    for name in ("RAY_ADDRESS", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def composed() -> DictConfig:
    configs: list[DictConfig] = []
    composition.run(lambda config: configs.append(config) or 0, ["recipe=quickstart", "trb.run_dir=/tmp/unused"])
    return configs[0]


@pytest.fixture
def config(composed: DictConfig, toy: ToyRun) -> DictConfig:
    """The quickstart with the toy run's files, composed once for all tests."""
    config = OmegaConf.create(OmegaConf.to_container(composed, resolve=True))
    OmegaConf.set_struct(config, False)
    config.actor_rollout_ref.model.path, config.trb.teacher.path = str(toy.student), str(toy.teacher)
    config.data.train_files, config.data.val_files = str(toy.train_file), str(toy.val_file)
    config.trb.run_dir = str(toy.folder / "run")
    return config


def refuses(check: Check, config: DictConfig) -> str:
    with pytest.raises(UserError) as refused:
        check(config)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_whole_run_passes_and_leaves_nothing_behind(config: DictConfig, toy: ToyRun):
    before = sorted(toy.folder.rglob("*"))
    preflight.check(config)
    assert sorted(toy.folder.rglob("*")) == before


# ------------------------------------------------------------------------------------------ through the program


def test_missing_teacher(refusal: Callable[..., str], toy: ToyRun):
    said = refusal(*toy.overrides, "trb.teacher.path=/nowhere/teacher")
    assert said == "trb.teacher.path=/nowhere/teacher: no such folder; give a model folder."
    assert not (toy.folder / "run").exists()


def test_prompt_too_long(refusal: Callable[..., str], toy: ToyRun):
    def lengthen(rows):
        rows[5]["prompt"][0]["content"] = "9" + "A" * 20 + "="

    file = toy.edit_rows(lengthen)
    said = refusal(*toy.overrides, f"data.train_files={file}")
    assert f"{file}: row 5 has a prompt of 22 tokens, more than data.max_prompt_length=16" in said
    assert not (toy.folder / "run").exists()


def test_tokenizers_that_differ(refusal: Callable[..., str], toy: ToyRun):
    swap_tokens(toy.teacher, "A", "B")
    said = refusal(*toy.overrides)
    assert "same token -> id map" in said and "'A'" in said and "'B'" in said


def test_inexact_sampling(refusal: Callable[..., str], toy: ToyRun):
    said = refusal(*toy.overrides, "actor_rollout_ref.rollout.top_p=0.9")
    assert "actor_rollout_ref.rollout.top_p=0.9 would make rollouts inexact" in said


def test_run_dir_that_cannot_be_written(refusal: Callable[..., str], toy: ToyRun):
    (toy.folder / "file").write_text("")
    said = refusal(*toy.overrides, f"trb.run_dir={toy.folder}/file/run")
    assert f"trb.run_dir={toy.folder}/file/run cannot be written" in said


def test_dead_ray_cluster(refusal: Callable[..., str], toy: ToyRun, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert refusal(*toy.overrides) == ("RAY_ADDRESS=127.0.0.1:1 does not answer; unset it, or start that Ray cluster.")


def test_too_little_memory(refusal: Callable[..., str], toy: ToyRun):
    size = "actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_memory_bytes"
    said = refusal(*toy.overrides, f"{size}={2**50}")
    assert said.startswith("Too little memory: ") and "KV cache 1048576.0 GiB" in said


def test_malformed_row(refusal: Callable[..., str], toy: ToyRun):
    def empty(rows):
        rows[3]["prompt"] = []

    file = toy.edit_rows(empty)
    assert refusal(*toy.overrides, f"data.val_files={file}") == (
        f"{file}: row 3, column 'prompt': the prompt is empty."
    )


def test_the_command_itself_exits_with_2(toy: ToyRun):
    arguments = [*toy.overrides, "trb.policy=trbb"]
    command = [sys.executable, "-m", "verl_trb.main", *arguments]
    done = subprocess.run(command, cwd=toy.folder, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: trb.policy: There is no rollout policy 'trbb'; did you mean 'trb'?\n"
    assert not (toy.folder / "run").exists()


# ------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("temperature", 0.0, "temperature must be > 0"),
        ("do_sample", False, "do_sample=true"),
        ("top_k", 50, "rollout.top_k=50"),
        ("top_p", 0.95, "rollout.top_p=0.95"),
        ("min_p", 0.1, "rollout.min_p=0.1"),
        ("repetition_penalty", 1.1, "rollout.repetition_penalty=1.1"),
        ("presence_penalty", 0.5, "rollout.presence_penalty=0.5"),
        ("frequency_penalty", 0.5, "rollout.frequency_penalty=0.5"),
        ("stop", ["\n"], "rollout.stop="),
        ("val_kwargs.top_p", 0.9, "rollout.val_kwargs.top_p=0.9"),
        ("val_kwargs.top_k", 20, "rollout.val_kwargs.top_k=20"),
    ],
)
def test_sampling_that_would_be_inexact(config: DictConfig, key: str, value: object, says: str):
    preflight.check_sampling(config)
    OmegaConf.update(config, f"actor_rollout_ref.rollout.{key}", value)
    assert says in refuses(preflight.check_sampling, config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("actor_rollout_ref.rollout.name", "vllm"),
        ("actor_rollout_ref.rollout.calculate_log_probs", False),
        ("actor_rollout_ref.rollout.logprobs_mode", "raw_logprobs"),
        ("actor_rollout_ref.model.lora_rank", 8),
        ("actor_rollout_ref.actor.strategy", "megatron"),
        ("trainer.v1.trainer_mode", "separate_async"),
        ("trainer.use_v1", False),
        ("distillation.enabled", True),
    ],
)
def test_parts_of_verl_that_do_not_fit(config: DictConfig, key: str, value: object):
    preflight.check_verl_settings(config)
    OmegaConf.update(config, key, value)
    assert key in refuses(preflight.check_verl_settings, config)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data.train_batch_size": 50}, "data.train_batch_size=50 must be a multiple"),
        ({"data.train_batch_size": 0}, "prompts per step must be at least 1"),
        ({"actor_rollout_ref.rollout.n": 0}, "rollouts per prompt must be at least 1"),
        ({"trainer.n_gpus_per_node": 5}, "cannot be divided among 5 devices"),
        ({"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": None}, "ppo_micro_batch_size_per_gpu"),
        (
            {"actor_rollout_ref.actor.use_dynamic_bsz": True, "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 40},
            "less than the longest sequence, 41 tokens",
        ),
        ({"actor_rollout_ref.rollout.tensor_model_parallel_size": 2}, "does not divide the 1 devices"),
        (
            {"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 9},
            "ppo_micro_batch_size_per_gpu=9 must divide the 48",
        ),
        ({"actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 36}, "=36 must divide the 48 sequences"),
    ],
)
def test_batches_that_do_not_divide(config: DictConfig, changes: dict[str, object], says: str):
    config.data.train_batch_size = config.actor_rollout_ref.actor.ppo_mini_batch_size = 48
    config.data.max_prompt_length, config.data.max_response_length = 16, 25
    preflight.check_batches(config)
    for key, value in changes.items():
        OmegaConf.update(config, key, value)
    assert says in refuses(preflight.check_batches, config)


@pytest.mark.parametrize(
    ("key", "value"), [("max_model_len", 40), ("max_num_batched_tokens", 64 * 5 - 1), ("max_num_seqs", 100_000)]
)
def test_engine_too_small_for_whole_blocks(config: DictConfig, key: str, value: int):
    config.trb.draft_tokens, config.actor_rollout_ref.rollout.max_num_seqs = 4, 64
    preflight.check_engine_sizes(config)
    config.actor_rollout_ref.rollout[key] = value
    assert "must be at least" in refuses(preflight.check_engine_sizes, config)


def test_what_verl_itself_refuses_is_said_before_ray_starts(config: DictConfig):
    config.actor_rollout_ref.actor.loss_agg_mode = "median"
    assert refuses(preflight.check_verl_config, config).startswith("verl refuses the configuration: ")


# ------------------------------------------------------------------------------------------ models


def swap_tokens(folder: Path, first: str, second: str) -> None:
    """Exchanges the ids of two tokens in a saved tokenizer."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text('{"vocab_size": 23'), "config.json is not JSON"),
        (lambda folder: (folder / "config.json").write_text("{}"), "has no num_hidden_layers"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"12"), "model.safetensors is damaged"),
        (
            lambda folder: os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1),
            "model.safetensors is damaged (cut short)",
        ),
    ],
)
def test_damaged_model_folder(config: DictConfig, toy: ToyRun, role: str, damage: Callable[[Path], object], says: str):
    key = {"student": "actor_rollout_ref.model.path", "teacher": "trb.teacher.path"}[role]
    damage(toy.folder / role)
    said = refuses(preflight.check_models, config)
    assert said.startswith(f"{key}={toy.folder / role}") and says in said


def test_model_that_is_no_folder(config: DictConfig, toy: ToyRun):
    config.trb.teacher.path = str(toy.train_file)
    assert "not a folder" in refuses(preflight.check_models, config)
    config.trb.teacher.path = None
    assert refuses(preflight.check_models, config).startswith("trb.teacher.path is not set")


def test_hub_name_is_for_gpus_only(config: DictConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config.trb.teacher.path = "Nobody/NoSuchModel"
    assert "Nobody/NoSuchModel: no such folder" in refuses(preflight.check_models, config)
    config.trainer.device = "cuda"
    preflight.check_models(config)
    assert preflight.models(config)["trb.teacher.path"] is None


@pytest.mark.parametrize(
    ("path", "hub"),
    [("Qwen/Qwen3-8B", True), ("/a/b", False), ("./a/b", False), ("~/a", False), ("a/b/c", False), ("a", False)],
)
def test_hub_names(path: str, hub: bool):
    assert is_hub_name(path) is hub


def test_model_too_short_for_the_sequences(config: DictConfig):
    config.actor_rollout_ref.rollout.max_model_len = 1000
    assert "the model reads at most 256 tokens" in refuses(preflight.check_models, config)


def test_tokenizer_larger_than_the_model(config: DictConfig, toy: ToyRun):
    file = toy.student / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 20}))
    assert "20 output rows" in refuses(preflight.check_tokenizers, config)


def test_tokenizer_that_does_not_load(config: DictConfig, toy: ToyRun):
    (toy.teacher / "tokenizer.json").write_text("{}")
    assert "trb.teacher.path: the tokenizer" in refuses(preflight.check_tokenizers, config)


def test_safetensors_header_against_the_library(toy: ToyRun):
    from safetensors import safe_open

    file = toy.teacher / "model.safetensors"
    header = safetensors_header(file)
    with safe_open(file, "pt") as tensors:
        names = list(tensors.keys())
        sizes = sum(tensors.get_tensor(name).numel() for name in names)
    assert {name for name in header if name != "__metadata__"} == set(names)
    model = preflight.find_model("trb.teacher.path", str(toy.teacher))
    assert model is not None and model.parameters == sizes


# ------------------------------------------------------------------------------------------ data


def without(column: str):
    def edit(rows):
        for row in rows:
            del row[column]

    return edit


def set_row(number: int, column: str, value: object):
    def edit(rows):
        rows[number][column] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (without("prompt"), "row 0 has no column 'prompt'; it has data_source"),
        (without("data_source"), "row 0 has no column 'data_source'"),
        (without("reward_model"), "row 0 has no column 'reward_model'"),
        (set_row(2, "prompt", None), "row 2, column 'prompt': there is no prompt"),
        (set_row(2, "prompt", "9A="), "row 2, column 'prompt': a prompt must be a list of messages"),
        (set_row(2, "prompt", [{"role": "user"}]), "row 2, column 'prompt': each message"),
        (set_row(2, "prompt", [{"role": "user", "content": " "}]), "row 2, column 'prompt': the prompt is empty"),
        (set_row(4, "data_source", None), "row 4, column 'data_source'"),
        (set_row(4, "reward_model", {"style": "rule"}), "row 4, column 'reward_model': there is no ground_truth"),
        (set_row(6, "prompt", [{"role": "user", "content": "9"}]), "row 6 has a prompt of 1 token"),
        (lambda rows: rows.__delitem__(slice(10, None)), "10 usable rows, fewer than the 48 of a batch"),
        (lambda rows: rows.clear(), "has no rows"),
    ],
)
def test_malformed_data(config: DictConfig, toy: ToyRun, edit: Callable[[list], None], says: str):
    config.data.train_files = str(toy.edit_rows(edit))
    config.data.train_batch_size = 48
    assert says in refuses(preflight.check_training_data, config)


def test_overlong_prompts_may_be_left_out(config: DictConfig, toy: ToyRun):
    def lengthen(rows):
        for row in rows[:20]:
            row["prompt"][0]["content"] = "9" + "A" * 30 + "="

    config.data.train_files = str(toy.edit_rows(lengthen))
    config.data.train_batch_size = 44
    assert "(20 rows are too long)" in refuses(preflight.check_training_data, config)
    config.data.filter_overlong_prompts = True
    preflight.check_training_data(config)  # 64 - 20 remain
    config.data.train_batch_size = 45
    assert "44 usable rows" in refuses(preflight.check_training_data, config)


def test_prompts_are_measured_with_the_chat_template(config: DictConfig):
    config.data.max_prompt_length = 14  # a prompt of the task without any template
    preflight.check_training_data(config)
    config.actor_rollout_ref.model.custom_chat_template = "{{ messages[0]['content'] }}=="
    assert "16 tokens" in refuses(preflight.check_training_data, config)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.parquet", None, "there is no file"),
        ("broken.parquet", b"PAR1 no", "is damaged"),
        ("broken.jsonl", b'{"prompt": [\n', "row 0 is not JSON"),
        ("table.csv", b"prompt\n", "neither .parquet nor .jsonl"),
    ],
)
def test_data_file_that_cannot_be_read(config: DictConfig, toy: ToyRun, name: str, content: bytes | None, says: str):
    file = toy.folder / name
    if content is not None:
        file.write_bytes(content)
    config.data.train_files = str(file)
    said = refuses(preflight.check_training_data, config)
    assert says in said and str(file) in said


# ------------------------------------------------------------------------------------------ machine


def test_kv_cache_smaller_than_one_sequence(config: DictConfig):
    config.actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_memory_bytes = 1000
    assert "less than one sequence" in refuses(preflight.check_memory, config)


def test_memory_is_what_is_free_now(config: DictConfig, monkeypatch: pytest.MonkeyPatch):
    preflight.check_memory(config)
    free = SimpleNamespace(available=2 * 2**30, total=64 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert "2.0 GiB are available" in refuses(preflight.check_memory, config)


def test_environment_decides_the_kv_cache_as_in_vllm(config: DictConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert preflight.kv_cache_bytes(config) == 3 * 2**30


def test_weight_larger_than_the_bucket(config: DictConfig):
    config.actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes = 0
    assert "student's embedding" in refuses(preflight.check_weight_bucket, config)


def test_stale_ray_session(config: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    record = tmp_path / "ray" / "ray_current_cluster"
    record.parent.mkdir()
    record.write_text("127.0.0.1:1\n")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    preflight.check_ray(config)  # the recipe starts a Ray of its own
    config.ray_kwargs.ray_init.address = None
    assert "set ray_kwargs.ray_init.address=local, or trb.prefork=false" in refuses(preflight.check_ray, config)
    config.trb.prefork = False
    said = refuses(preflight.check_ray, config)
    assert str(record) in said and "no longer answers" in said


def test_port_in_the_way(config: DictConfig):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config.ray_kwargs.ray_init.update(include_dashboard=True, dashboard_port=port)
        assert f"Port {port}" in refuses(preflight.check_ray, config)
        config.trb.prefork = False
        config.ray_kwargs.ray_init.address = f"127.0.0.1:{port}"
        config.ray_kwargs.ray_init.include_dashboard = False
        preflight.check_ray(config)  # something answers there
    assert f"address=127.0.0.1:{port} does not answer" in refuses(preflight.check_ray, config)


def test_gpus_that_are_not_there(config: DictConfig):
    config.trainer.device, config.trainer.n_gpus_per_node = "cuda", 1000
    with pytest.raises(preflight.Absent, match="needs 1000 GPUs"):
        preflight.check_accelerators(config)


def test_problems_lists_all_of_them(config: DictConfig, toy: ToyRun):
    config.actor_rollout_ref.rollout.top_p = 0.5
    config.trb.policy = "nobody"
    config.data.val_files = str(toy.folder / "missing.parquet")
    wrong, absent = preflight.problems(config)
    assert [any(word in text for text in wrong) for word in ("top_p", "nobody")] == [True, True]
    assert len(wrong) == 2 and len(absent) == 1 and "missing.parquet" in absent[0]
