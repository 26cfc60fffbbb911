"""The configuration: values and keys that are refused in one sentence, and what is filled in."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from verl_trb import composition
from verl_trb.config import TrbConfig, trb_config
from verl_trb.errors import ConfigError
from verl_trb.rollout.engine_args import model_length


def compose(*arguments: str) -> list[DictConfig]:
    """The completed configurations of a command line."""
    composed: list[DictConfig] = []
    composition.run(lambda config: composed.append(config) or 0, arguments)
    return composed


def test_commands_without_options_of_hydra_are_composed_as_hydra_would(monkeypatch):
    command = ["recipe=trb_then_grpo", "method=skd", "trb.epsilon=0.1", "+actor_rollout_ref.model.override_config.a=2"]
    (ours,) = compose(*command)
    used = []
    monkeypatch.setattr(hydra, "compose", lambda *arguments, **options: used.append(arguments))
    (hydras,) = compose(*command, "hydra.verbose=false")
    assert ours == hydras and not used


def with_trb(**values: object) -> DictConfig:
    return OmegaConf.create({"trb": values})


def test_defaults_are_the_dataclass():
    assert trb_config(with_trb()) == TrbConfig()


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("epsilon", -0.01, "trb.epsilon must be a finite number >= 0"),
        ("epsilon", float("nan"), "trb.epsilon must be a finite number >= 0"),
        ("epsilon", float("inf"), "trb.epsilon must be a finite number >= 0"),
        ("epsilon", "large", "trb.epsilon: Value 'large'"),
        ("warmup_steps", 0, "trb.warmup_steps must be >= 1"),
        ("warmup_steps", 2.5, "trb.warmup_steps: Value '2.5'"),
        ("guided_steps", 0, "trb.guided_steps must be >= 1"),
        ("draft_tokens", 0, "trb.draft_tokens must be >= 1"),
        ("topk", -1, "trb.topk must be >= 1"),
        ("loss_chunk_tokens", 0, "trb.loss_chunk_tokens must be >= 1"),
        ("loss", "forward", "trb.loss must be one of full, topk, sampled; got 'forward'"),
        ("teacher", {"dtype": "int8"}, "trb.teacher.dtype must be one of bfloat16, float16, float32"),
        ("teacher", {"pth": "x"}, "no configuration key trb.teacher.pth; did you mean trb.teacher.path?"),
        ("epsilonn", 0.1, "no configuration key trb.epsilonn; did you mean trb.epsilon?"),
    ],
)
def test_wrong_value_is_one_sentence_with_its_key(key: str, value: object, says: str):
    with pytest.raises(ConfigError) as refused:
        trb_config(with_trb(**{key: value}))
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_reruns_that_are_to_be_equal_have_no_clock_in_them():
    with pytest.raises(ConfigError, match=r"adapt_drafts=true and trb\.deterministic=true exclude each other"):
        trb_config(with_trb(adapt_drafts=True, deterministic=True))


@pytest.mark.parametrize("values", [{"epsilon": 0}, {"epsilon": 1, "draft_tokens": 1, "warmup_steps": 1, "topk": 1}])
def test_values_at_the_edge_are_taken(values: dict[str, float]):
    checked = trb_config(with_trb(**values))
    assert {name: getattr(checked, name) for name in values} == values


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("trb.epsilon=-1", "trb.epsilon must be a finite number >= 0"),
        ("trb.warmup_steps=0", "trb.warmup_steps must be >= 1"),
        ("trb.draft_tokens=0", "trb.draft_tokens must be >= 1"),
        ("trb.epsilonn=1", "did you mean trb.epsilon?"),
        ("+trb.epsilonn=1", "did you mean trb.epsilon?"),
        ("epsilon=0.1", "did you mean trb.epsilon?"),
        ("trainer.total_epoch=1", "did you mean trainer.total_epochs?"),
        ("actor_rollout_ref.rollout.temprature=1", "did you mean actor_rollout_ref.rollout.temperature?"),
        ("data.train_batch_size=many", "data.train_batch_size must be a number, got 'many'"),
        ("trainer.val_before_train=2", "trainer.val_before_train must be true or false, got 2"),
        ("trainer=3", "trainer must be a section"),
        ("trb.loss=[", "Cannot read 'trb.loss=['"),
        ("quickstart", "Cannot read 'quickstart'"),
        ("recipe=quikstart", "There is no recipe 'quikstart'; did you mean recipe=quickstart?"),
    ],
)
def test_command_is_refused(refusal: Callable[..., str], argument: str, says: str):
    recipe = [] if argument.startswith("recipe=") else ["recipe=quickstart"]
    assert says in refusal(*recipe, argument)


def test_no_recipe_lists_them(refusal: Callable[..., str]):
    said = refusal()
    assert said.startswith("No recipe given") and "quickstart" in said and "qwen3_1p7b" in said and "_cpu" not in said


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"trainer": {"total_epoch": 1}}, "did you mean trainer.total_epochs (set by recipe mine"),
        ({"trb": {"espilon": 1}}, "did you mean trb.epsilon?"),
        ({"data": {"train_batch_size": "many"}}, "data.train_batch_size must be a number, got 'many'"),
    ],
)
def test_recipe_file_is_refused(
    refusal: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: dict, says: str
):
    recipe = {"defaults": ["_cpu", "_self_"]} | content
    (tmp_path / "mine.yaml").write_text("# @package _global_\n" + yaml.safe_dump(recipe))
    monkeypatch.setenv("VERL_TRB_RECIPES", str(tmp_path))
    assert says in refusal("recipe=mine")


def test_recipe_that_is_not_yaml_names_its_line(
    refusal: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "mine.yaml").write_text("# @package _global_\ntrb:\n  policy: 'trb\n")
    monkeypatch.setenv("VERL_TRB_RECIPES", str(tmp_path))
    assert "mine.yaml, line " in refusal("recipe=mine")


def test_verl_fields_that_its_reference_file_leaves_out_are_known():
    # mixed_precision is a field of verl's FSDPEngineConfig only.
    key = "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype"
    (config,) = compose("recipe=quickstart", f"{key}=bf16")
    assert OmegaConf.select(config, key) == "bf16"


def test_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (config,) = compose("recipe=quickstart", "trb.draft_tokens=3", "trainer.total_epochs=7")
    assert config.trb.recipe == config.trainer.experiment_name == "quickstart"
    assert config.trb.run_dir == str(tmp_path / "runs" / "quickstart")
    assert config.trainer.default_local_dir == str(tmp_path / "runs" / "quickstart" / "checkpoints")
    length = model_length(config.data.max_prompt_length, config.data.max_response_length, 3)
    assert config.actor_rollout_ref.rollout.max_model_len == length
    assert config.trainer.total_epochs == 7
    assert list(tmp_path.iterdir()) == []  # Hydra makes no folder


def test_run_dir_names_a_changed_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for policy, name in (("student", "quickstart-student"), ("trb", "quickstart")):
        (config,) = compose("recipe=quickstart", f"trb.policy={policy}")
        assert config.trb.run_dir == str(tmp_path / "runs" / name)


def test_run_dir_names_the_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    configs = compose("-m", "recipe=quickstart", "method=teacher,vanilla", "trb.draft_tokens=1,2")
    assert [Path(config.trb.run_dir).name for config in configs] == [
        f"quickstart-{method}-trb.draft_tokens={drafts}" for method in ("teacher", "vanilla") for drafts in (1, 2)
    ]
    (config,) = compose("recipe=quickstart", "method=skd", "trb.policy=teacher")
    assert Path(config.trb.run_dir).name == "quickstart-skd-teacher"


def test_sweep_gives_each_run_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    configs = compose("-m", "recipe=quickstart", "trb.epsilon=0.1,0.2", "trb.policy=trb,student")
    assert [(config.trb.epsilon, config.trb.policy) for config in configs] == [
        (0.1, "trb"),
        (0.1, "student"),
        (0.2, "trb"),
        (0.2, "student"),
    ]
    assert len({config.trb.run_dir for config in configs}) == 4


def test_sweep_stops_at_a_wrong_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    started: list[float] = []
    with pytest.raises(ConfigError, match="trb.epsilon"):
        composition.run(
            lambda config: started.append(config.trb.epsilon) or 0,
            ["-m", "recipe=quickstart", "trb.epsilon=0.1,-1,0.2"],
        )
    assert started == [0.1]


def test_sweep_into_one_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="share trb.run_dir"):
        compose("-m", "recipe=quickstart", "trb.epsilon=0.1,0.2", f"trb.run_dir={tmp_path}/one")


def test_result_of_a_run_is_the_exit_code():
    assert composition.run(lambda config: 7, ["recipe=quickstart"]) == 7


def test_error_inside_a_run_passes_unchanged(capfd: pytest.CaptureFixture[str]):
    def fail(config: DictConfig) -> int:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        composition.run(fail, ["recipe=quickstart"])
    assert capfd.readouterr().err == ""


def test_refused_before_anything_heavy_is_imported(tmp_path: Path):
    program = (
        "import sys; from verl_trb.main import main; code = main(['recipe=quickstart', 'trb.epsilon=-1']); "
        "heavy = {'torch', 'verl', 'vllm', 'ray', 'transformers'} & set(sys.modules); "
        "print(*heavy); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (2, "")
    assert done.stderr == "error: trb.epsilon must be a finite number >= 0 (nats per token), got -1.0.\n"
    assert list(tmp_path.iterdir()) == []


def test_policy_file_of_one_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its path is whole, because workers may stand elsewhere; the run is named by the policy."""
    monkeypatch.chdir(tmp_path)
    (config,) = compose("recipe=quickstart", "trb.policy=mine.py:either")
    assert config.trb.policy == f"{tmp_path}/mine.py:either"
    assert Path(config.trb.run_dir).name == "quickstart-either"
