"""Recipes: found from anywhere and in every kind of install, the paper's numbers, and the dry run."""

import io
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import ToyRun
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from verl_trb import composition, dry_run
from verl_trb.guidance import check_guidance, guidance
from verl_trb.recipe_source import METHOD, names, recipe_names

ROOT = Path(__file__).resolve().parent.parent


def compose_all(*arguments: str) -> list[DictConfig]:
    """The configurations of every run of a command."""
    composed: list[DictConfig] = []
    composition.run(lambda config: composed.append(config) or 0, arguments)
    return composed


def compose(*arguments: str) -> DictConfig:
    (config,) = compose_all(*arguments)
    return config


def dry(*arguments: str) -> tuple[int, str]:
    """Exit code and output of a dry run."""
    screen = io.StringIO()
    code = composition.run(lambda config: dry_run.show(config, screen), [*arguments, "dry_run=true"])
    return code, screen.getvalue()


PAPER = {
    "data.train_batch_size": 64,
    "data.max_prompt_length": 1024,
    "data.max_response_length": 7168,
    "data.shuffle": False,
    "actor_rollout_ref.rollout.n": 4,
    "actor_rollout_ref.rollout.temperature": 1.0,
    "actor_rollout_ref.rollout.top_p": 1.0,
    "actor_rollout_ref.rollout.top_k": -1,
    "actor_rollout_ref.rollout.val_kwargs.temperature": 1.0,
    "actor_rollout_ref.rollout.val_kwargs.top_p": 1.0,
    "actor_rollout_ref.rollout.val_kwargs.top_k": -1,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 64,
    "actor_rollout_ref.actor.ppo_epochs": 1,
    "actor_rollout_ref.actor.strategy": "fsdp2",
    "actor_rollout_ref.actor.grad_clip": 1.0,
    "actor_rollout_ref.actor.optim.optimizer": "AdamW",
    "actor_rollout_ref.actor.optim.lr": 1e-5,
    "actor_rollout_ref.actor.optim.betas": [0.9, 0.999],
    "actor_rollout_ref.actor.optim.weight_decay": 0.01,
    "actor_rollout_ref.actor.optim.lr_warmup_steps": 15,
    "actor_rollout_ref.actor.optim.lr_scheduler_type": "constant",
    "trb.epsilon": 0.02,
    "trb.warmup_steps": 50,
    "trb.loss": "topk",
    "trb.topk": 16,
    "trainer.total_training_steps": 400,
    "trainer.total_epochs": 1,
    "trainer.test_freq": 20,
    "trainer.n_gpus_per_node": 8,
}


@pytest.mark.parametrize(
    ("name", "student", "teacher"),
    [
        ("qwen3_1p7b", "Qwen/Qwen3-1.7B-Base", "Qwen/Qwen3-8B"),
        ("qwen3_0p6b", "Qwen/Qwen3-0.6B-Base", "Qwen/Qwen3-4B"),
    ],
)
def test_the_paper_s_settings(name: str, student: str, teacher: str):
    config = compose(f"recipe={name}")
    assert {key: OmegaConf.select(config, key) for key in PAPER} == PAPER
    assert (config.actor_rollout_ref.model.path, config.trb.teacher.path) == (student, teacher)


def test_dry_run_of_the_paper_s_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    code, screen = dry("recipe=qwen3_1p7b", "data.train_files=none.parquet", "data.val_files=none.parquet")
    assert code == 0 and "no problems found" in screen
    row = {" ".join(words[:-1]): words[-1] for line in screen.splitlines() if (words := line.split())}
    assert row["sequences per step"] == "256" and row["optimizer steps per step"] == "1"
    for text in ("Qwen/Qwen3-8B", "8 GPUs", "none.parquet", "0.0104", "1e-05", "8,192"):
        assert text in screen
    assert sorted(tmp_path.iterdir()) == []


def test_dry_run_lists_every_problem(tmp_path: Path):
    code, screen = dry(
        "recipe=qwen3_1p7b",
        "actor_rollout_ref.rollout.top_k=20",
        "data.train_batch_size=65",
        "trb.policy=nobody",
        "actor_rollout_ref.rollout.max_model_len=100",
    )
    problems = [line for line in screen.splitlines() if line.startswith("problem: ")]
    assert code == 2 and len(problems) == 4
    for text in ("top_k=20", "train_batch_size=65", "nobody", "max_model_len=100"):
        assert sum(text in line for line in problems) == 1
    assert "no problems found" not in screen


def test_dry_run_of_models_that_are_here(toy: ToyRun):
    code, screen = dry(*toy.overrides)
    assert code == 0
    rows = [line.split() for line in screen.splitlines() if line.startswith(("student ", "teacher "))]
    assert [row[3:5] for row in rows] == [["2", "2/1"], ["4", "4/2"]]  # layers, heads/kv
    assert not (toy.folder / "run").exists()


def test_dry_run_makes_no_models(tmp_path: Path):
    code, screen = dry("recipe=quickstart", f"trb.cache_dir={tmp_path}/cache", f"trb.run_dir={tmp_path}/run")
    assert code == 0 and "made at first use" in screen
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_sound(name: str, tmp_path: Path):
    _, screen = dry(f"recipe={name}", f"trb.cache_dir={tmp_path}")
    assert [line for line in screen.splitlines() if line.startswith("problem: ")] == []


# Of each method: its policy, and in how many runs of which settings the sweep in its file results.
METHODS = {
    "vanilla": ("student", 0),
    "trb": ("trb", 5 * 3),
    "fixed_epsilon": ("fixed_epsilon", 5),
    "fixed_beta": ("fixed_beta", 4),
    "teacher_mix": ("teacher_mix", 3),
    "skd": ("skd", 3 * 3),
    "teacher": ("teacher", 3),
    "temperature_warmup": ("temperature", 3 * 2),
    "saki": ("saki", 5 * 3),
}


def commands(method: str) -> list[list[str]]:
    """The commands in the comment of a method's file."""
    lines = (ROOT / "recipes" / "methods" / f"{method}.yaml").read_text().splitlines()
    start = "#   python -m verl_trb.main "
    return [shlex.split(line.removeprefix(start)) for line in lines if line.startswith(start)]


def sweep(method: str) -> list[DictConfig]:
    """The `trb` settings of every run of a method's sweep, of which only the first is composed here."""
    _, command = commands(method)
    assert command[:3] == ["-m", "recipe=qwen3_1p7b", f"method={method}"]
    config = compose(*command[1:3])
    assert config.actor_rollout_ref.model.path == "Qwen/Qwen3-1.7B-Base"
    parse = OverridesParser.create().parse_overrides
    (points,) = BasicSweeper.split_arguments(parse(command[3:]), max_batch_size=None)
    runs = []
    for point in points:
        runs.append(run := OmegaConf.create({"trb": config.trb}))
        for override in parse(list(point)):
            OmegaConf.update(run, override.key_or_group, override.value())
    return [run.trb for run in runs]


@pytest.mark.parametrize("method", METHODS)
def test_the_commands_of_a_method(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One word chooses it; its sweep is as large as it says, and every run is sound and different."""
    monkeypatch.chdir(tmp_path)
    policy, runs = METHODS[method]
    single = commands(method)[0]
    assert single[:2] == ["recipe=quickstart", f"method={method}"]
    config = compose(*single)
    assert (config.trb.policy, config.trb.method, config.trb.prepare) == (policy, method, "table_walk")
    assert Path(config.trb.run_dir).name == f"quickstart-{method}"
    check_guidance(config.trb)
    if runs:
        settings = sweep(method)
        for trb in settings:
            assert trb.policy == policy
            check_guidance(trb)
        assert len(settings) == len({str([guidance(trb, step) for step in range(1, 60)]) for trb in settings}) == runs


def test_the_paper_s_sweeps():
    """arXiv 2605.31159's grids, by what every run does."""

    def grid(method: str, *keys: str) -> set[tuple]:
        return {tuple(OmegaConf.select(trb, key) for key in keys) for trb in sweep(method)}

    epsilons = (0.001, 0.005, 0.01, 0.02, 0.05)
    assert grid("trb", "epsilon", "warmup_steps") == {(e, k) for e in epsilons for k in (15, 25, 50)}
    assert grid("fixed_epsilon", "epsilon") == {(e,) for e in epsilons}
    params = "policy_params.k", "policy_params.temperature"
    assert grid("skd", *params) == {(k, t) for k in (15, 25, 50) for t in (0.2, 0.6, 1.0)}
    warmups = set()
    for trb in sweep("temperature_warmup"):
        values = [guidance(trb, step) for step in range(1, 99)]
        warmups.add((values[0]["temperature"], values.index(None)))
    assert warmups == {(t, k) for t in (0.8, 0.9, 0.95) for k in (15, 25)}
    assert grid("sft_warmup", "sft_steps") == {(15,), (25,), (50,)}
    starts = {(run.divergence_params.beta[0][1], *run.divergence_params.beta[-1]) for run in sweep("veto")}
    assert starts == {(b, 400, 0) for b in (0.2, 0.4, 0.6, 0.8)}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", recipe_names())
def test_every_method_goes_with_every_recipe(recipe: str, tmp_path: Path):
    plain = compose(f"recipe={recipe}")
    for method in names(METHOD):
        config = compose(f"recipe={recipe}", f"method={method}", f"trb.cache_dir={tmp_path}")
        check_guidance(config.trb)
        assert config.trb.teacher.path == plain.trb.teacher.path


def test_a_method_is_part_of_the_dry_run(tmp_path: Path):
    code, screen = dry("recipe=quickstart", "method=skd", f"trb.cache_dir={tmp_path}")
    assert code == 0 and "skd, k = 3, temperature = 0.6" in screen
    code, screen = dry("recipe=quickstart", "method=skd", "trb.policy_params.k=2.5", f"trb.cache_dir={tmp_path}")
    assert code == 2 and screen.count("k must be a whole number") == 1


def test_every_method_has_a_paragraph():
    paragraphs = (ROOT / "docs" / "methods.md").read_text()
    assert [method for method in names(METHOD) if f"`method={method}`" not in paragraphs] == []


def test_names():
    assert {"quickstart", "qwen3_1p7b", "qwen3_0p6b", "smollm2_pruned"} <= set(recipe_names())
    assert set(METHODS) <= set(names(METHOD))
    assert not any(name.startswith("_") for name in [*recipe_names(), *names(METHOD)])


def recipe_of_ones_own(folder: Path) -> None:
    folder.mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - quickstart\n  - _self_\ntrb:\n  epsilon: 0.077\n"
    (folder / "mine.yaml").write_text(text)


def test_folder_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe_of_ones_own(tmp_path / "own")
    monkeypatch.setenv("VERL_TRB_RECIPES", f"{tmp_path}/own")
    config = compose("recipe=mine")
    assert (config.trb.epsilon, config.trb.prepare) == (0.077, "table_walk")
    assert "mine" in recipe_names()
    (tmp_path / "own" / "methods").mkdir()
    method = "# @package _global_\ntrb:\n  policy: teacher_mix\n  policy_params: {alpha: 0.7}\n"
    (tmp_path / "own" / "methods" / "strong.yaml").write_text(method)
    config = compose("recipe=quickstart", "method=strong")
    assert (config.trb.policy, config.trb.policy_params.alpha) == ("teacher_mix", 0.7)
    assert "strong" in names(METHOD)
    monkeypatch.setenv("VERL_TRB_RECIPES", f"{tmp_path}/nowhere")
    with pytest.raises(ValueError, match="nowhere, which is not a folder"):
        compose("recipe=quickstart")


def test_hydra_s_config_dir(tmp_path: Path):
    recipe_of_ones_own(tmp_path / "recipe")
    assert compose("--config-dir", str(tmp_path), "recipe=mine").trb.epsilon == 0.077


def test_another_working_directory(tmp_path: Path):
    command = [sys.executable, "-m", "verl_trb.main", "recipe=quickstart", "--cfg", "job"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and OmegaConf.create(done.stdout).trb.prepare == "table_walk"
    assert list(tmp_path.iterdir()) == []


def test_packages_of_the_wheel_are_those_of_the_repository():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "verl_trb").rglob("*.py")}
    assert set(listed) == found | {"verl_trb.recipes"}


def test_normal_install_brings_the_recipes(tmp_path: Path):
    source, target = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("verl_trb", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("verl_trb-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
        (points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "verl_trb_cpu = verl_trb.platforms:register" in archive.read(points).decode()
    program = (
        "import verl_trb; from verl_trb.recipe_source import names; from verl_trb.composition import run; "
        "print(verl_trb.__file__); print(*names('recipe'), *names('method')); "
        "run(lambda config: print(config.trb.epsilon) or 0, ['recipe=quickstart', 'method=skd'])"
    )
    environment = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    where, found, epsilon = done.stdout.splitlines()
    assert Path(where).is_relative_to(target)
    assert found.split() == [*recipe_names(), *names(METHOD)]
    assert float(epsilon) == compose("recipe=quickstart").trb.epsilon
