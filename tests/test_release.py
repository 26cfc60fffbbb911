"""What a release says of itself in several files is the same everywhere; sdist and wheel hold all they need."""

import os
import re
import runpy
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import verl_trb

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_one_version() -> None:
    changes = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert verl_trb.__version__ == PROJECT["version"] == changes[0] == str(citation["version"])
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert citation["title"].startswith(PROJECT["name"])
    assert len(changes) == len(set(changes))


def test_docker_images_are_made_of_what_is_there() -> None:
    """Every file that a Dockerfile copies exists, its Python is supported, and torch is the pinned one."""
    pins = dict(pin.split("==") for pin in PROJECT["dependencies"] if "[" not in pin)
    for file in (ROOT / "docker").glob("*.Dockerfile"):
        text = file.read_text()
        copied = [name for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for name in line.split()[:-1]]
        assert copied and all((ROOT / name).exists() for name in copied), file
        assert {"pyproject.toml", "README.md", "LICENSE", "verl_trb", "recipes", "scripts"} <= set(copied)
        assert re.findall(r"python:?3\.(\d+)", text)[0] in ("11", "12")
        assert all(version == pins["torch"] for version in re.findall(r"torch==(\S+)", text))


def test_an_audit_says_what_it_has_not_looked_up() -> None:
    """pip-audit itself ends with 0 where the database did not answer."""
    verdict = runpy.run_path(str(ROOT / "scripts" / "audit.py"))["verdict"]
    sound = {"name": "one", "version": "1", "vulns": []}
    unknown = {"name": "two", "skip_reason": "Dependency not found"}
    bad = {"name": "three", "version": "3", "vulns": [{"id": "CVE-1", "fix_versions": ["3.1"]}]}
    assert verdict([sound]) == (0, ["1 of 1 packages looked up, 0 with known vulnerabilities"])
    code, lines = verdict([sound, unknown])
    assert code == 3 and "NOT AUDITED: 1 packages" in lines[-1] and "two" in lines[-1]
    code, lines = verdict([sound, unknown, bad])
    assert code == 1 and lines[0] == "three 3: CVE-1, mended in 3.1"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_wheel_runs_elsewhere(tmp_path: Path) -> None:
    """Built from the sdist, installed with the lock into a new environment, the quickstart in another folder."""
    short = ["trainer.total_training_steps=6", "trainer.test_freq=6", "data.val_max_samples=64"]
    script = ROOT / "scripts" / "check_wheel.sh"
    done = subprocess.run([script, *short], env={**os.environ, "FOLDER": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("the wheel runs\n"), done.stdout + done.stderr
    (wheel,) = tmp_path.glob("dist/*.whl")
    assert f"-{PROJECT['version']}-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        assert "verl_trb/recipes/methods/trb.yaml" in archive.namelist()
