"""Every file and command of docs/extending.md, as it stands there."""

import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from verl_trb import divergences, policies
from verl_trb.divergences import Prefixes, get_divergence
from verl_trb.parameters import run_file
from verl_trb.policies import get_policy
from verl_trb.report import read_metrics

# What the page registers in this process ends with its tests.
pytestmark = pytest.mark.usefixtures("registries_as_they_were")

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()


@pytest.fixture(scope="module")
def registries_as_they_were() -> Iterator[None]:
    before = dict(policies._POLICIES), dict(divergences._DIVERGENCES)
    yield
    for registry, entries in zip((policies._POLICIES, divergences._DIVERGENCES), before, strict=True):
        registry.clear()
        registry.update(entries)
    run_file.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's files, and the task's data."""
    folder = tmp_path_factory.mktemp("extending")
    files = re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert [name for name, _ in files] == ["policies.py", "losses.py", "task.py", "recipes/sorting.yaml"]
    for name, content in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    subprocess.run([sys.executable, "task.py", "."], cwd=folder, check=True)
    return folder


def commands() -> list[str]:
    """The page's commands of the program, each in one line."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if "verl_trb.main" in line]


def run(folder: Path, command: str, *more: str) -> subprocess.CompletedProcess:
    words = shlex.split(command)
    environment = dict(word.split("=", 1) for word in words[: words.index("python")])
    arguments = [sys.executable, *words[words.index("python") + 1 :], *more]
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **environment, "PYTHONPATH": path}
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def test_policy(folder: Path) -> None:
    policy = get_policy(f"{folder}/policies.py:tilted_mix")
    draw = np.random.default_rng(0)
    q, p = draw.dirichlet(np.ones(7), 5), draw.dirichlet(np.ones(7), 5)
    result = policy(torch.tensor(q).log(), torch.tensor(p).log(), alpha=0.3)
    geometric = np.sqrt(q * p) / np.sqrt(q * p).sum(-1, keepdims=True)
    np.testing.assert_allclose(result.log_mu.exp(), 0.7 * q + 0.3 * geometric, rtol=1e-9)


def test_loss(folder: Path) -> None:
    rule = get_divergence(f"{folder}/losses.py:hellinger").rule("full", 0, {})
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    logp = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    naive = ((logits.softmax(-1).sqrt() - logp.exp().sqrt()) ** 2).sum(-1)
    naive.sum().backward()
    integrand = rule(Prefixes(logits.detach().log_softmax(-1), logp))
    torch.testing.assert_close(integrand.value_C, naive.detach())
    torch.testing.assert_close(integrand.gradient_CV(logits.detach().softmax(-1)), logits.grad)


@pytest.mark.parametrize("command", commands())
def test_command_passes_the_dry_run(folder: Path, toy_files: Path, command: str) -> None:
    models = [f"actor_rollout_ref.model.path={toy_files}/student", f"trb.teacher.path={toy_files}/teacher"]
    if "data.train_files" not in command and "sorting" not in command:
        models += [f"data.train_files={toy_files}/train.parquet", f"data.val_files={toy_files}/val.parquet"]
    done = run(folder, command, *models, "trb.prepare=null", "dry_run=true")
    assert done.returncode == 0 and "no problems found" in done.stdout, done.stdout + done.stderr


def test_the_page_has_a_command_for_each(folder: Path) -> None:
    assert len(commands()) == 4


@pytest.mark.slow
def test_recipe_trains(folder: Path) -> None:
    small = ["trainer.total_training_steps=2", "data.val_max_samples=16", "trainer.test_freq=100"]
    cache = os.environ.get("VERL_TRB_TEST_CACHE", str(folder / "cache"))
    done = run(folder, commands()[-1], *small, f"trb.cache_dir={cache}", f"trb.run_dir={folder}/run")
    assert done.returncode == 0, done.stdout + done.stderr
    steps = read_metrics(folder / "run")[1:]
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert math.isfinite(line["actor/loss"]) and line["trb/param/alpha"] > 0.4
        assert line["trb/log_ratio_trainer"] == pytest.approx(line["trb/log_ratio"], abs=1e-4)
